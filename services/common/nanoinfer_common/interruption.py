"""Interrupting what a task waits for, with an error of its own: as `asyncio.timeout` does it."""

import asyncio
from collections.abc import Callable


class Interruptible:
    """A block that `interrupt` ends with an error, unless others cancel the task too."""

    def __init__(self, make_error: Callable[[], Exception]) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("outside any task")
        self._task, self._num_cancels = task, task.cancelling()
        self._make_error = make_error
        self._is_interrupted = False

    def interrupt(self) -> None:
        """End the block; more than once is once."""
        if not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def __enter__(self) -> "Interruptible":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        if not self._is_interrupted:
            return
        # taken back whatever came of it; ours is the end only if nobody else cancelled the task
        was_ours = self._task.uncancel() <= self._num_cancels
        if was_ours and kind is asyncio.CancelledError:
            raise self._make_error()
