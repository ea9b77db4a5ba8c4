"""A block of a task that something else may end, as `asyncio.timeout` ends one."""

import asyncio
from types import TracebackType
from typing import Self

NUM_TICKS = 4


class Interruption:
    """A `with` block that `interrupt()` ends with `error`; it may enclose no `yield`."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._task: asyncio.Task[object] | None = None
        self._num_cancels = 0
        self._is_interrupted = False

    def interrupt(self) -> None:
        """End the block at what it waits for. Once is enough."""
        if self._task is not None and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._task is None:
            raise RuntimeError("outside any task")
        self._num_cancels = self._task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if task is None or not self._is_interrupted:
            return
        # ours is the end only if nobody else cancelled the task
        if task.uncancel() <= self._num_cancels and kind is asyncio.CancelledError:
            raise self._error from error


class Silence(Interruption):
    """An `Interruption` after `seconds` without a call of `heard`.

    The time is counted in ticks, so that a pause of this process is one tick and not a silence.
    """

    def __init__(self, seconds: float, error: Exception) -> None:
        super().__init__(error)
        self._seconds: float | None = seconds
        self._num_left = NUM_TICKS
        self._timer: asyncio.TimerHandle | None = None

    def heard(self, seconds: float | None) -> None:
        """Begin to count again, up to `seconds` from now on; None never ends the block."""
        self._num_left = NUM_TICKS
        if seconds != self._seconds:
            self._seconds = seconds
            self._start_timer()

    def __enter__(self) -> Self:
        super().__enter__()
        self._start_timer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop_timer()
        super().__exit__(kind, error, _)

    def _start_timer(self) -> None:
        self._stop_timer()
        if self._seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds / NUM_TICKS, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._num_left -= 1
        if self._num_left > 0:
            self._start_timer()
        else:
            self.interrupt()
