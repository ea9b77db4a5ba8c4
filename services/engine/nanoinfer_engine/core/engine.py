"""The engine: one thread that steps, and the event loop's way to it. The only file with threads.

    event loop                    │ engine thread
    submit ──▶ inbox (condition) ─┼─▶ scheduler.add / cancel
    Stream ◀── deliver ◀── outbox ┼── schedule → execute → update
               (one pending call_soon_threadsafe)

The thread loads the model and steps it. The event loop reads `load` and `statistics`, which the
thread replaces as a whole after each step; it never waits for a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVarTuple

from nanoinfer_engine.core.batch import Runner
from nanoinfer_engine.core.capacity import Capacity, Load
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.errors import (
    DrainingError,
    EngineError,
    EngineLostError,
    NotReadyError,
    QueueFullError,
    is_device_error,
    is_memory_error,
)
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.request import FinishReason, Request, RequestOutput
from nanoinfer_engine.core.scheduler import Scheduler
from nanoinfer_engine.core.statistics import Snapshot, Statistics
from nanoinfer_engine.core.stream import Stream, Streams
from nanoinfer_engine.core.watchdog import Listener, Patience, watch_progress

_LOG = logging.getLogger(__name__)
# Bounds of RetryInfo's estimate in seconds, and the tokens per second assumed before any was seen.
_MIN_RETRY, _MAX_RETRY = 0.1, 30.0
_UNKNOWN_RATE = 1000.0
_JOIN_SECONDS = 10.0
Ts = TypeVarTuple("Ts")
StartTask = Callable[[str, Callable[[], Awaitable[None]]], asyncio.Task[None]]


@dataclass(frozen=True)
class _Cancel:
    requests: tuple[Request, ...]
    error: Exception | None
    reason: FinishReason


class Engine:
    """Serves requests from one runner until drained and stopped."""

    def __init__(
        self,
        config: EngineConfig,
        load_runner: Callable[[], Runner],
        make_statistics: Callable[[int], Statistics],
        listener: Listener,
        patience: Patience | None = None,
        start_task: StartTask | None = None,
    ) -> None:
        """`load_runner` and `make_statistics` (of the model's max_model_len) are called by `start`.

        They run in the engine thread, because whoever loads owns its threads' pools. `start_task`
        starts the watchdog, and again where it fails; without it a failure ends the watchdog.
        """
        self.config = config
        self.statistics = Snapshot()
        self.rejections = {"requests": 0, "tokens": 0, "bytes": 0}  # by the bound that was hit
        self._load_runner = load_runner
        self._make_statistics = make_statistics
        self._listener = listener
        self._patience = patience or Patience()
        self._thread: threading.Thread | None = None
        self._start_task = start_task or _start_task
        self._watchdog: asyncio.Task[None] | None = None
        self._is_stalled = False
        # shared by both threads, written with the condition held
        self._condition = threading.Condition()
        self._inbox: deque[tuple[Request, ...] | _Cancel] = deque()
        self._load = Load()  # the scheduler's, plus what waits in the inbox
        self._refusal: EngineError | None = NotReadyError("the engine is loading")
        self._stopping = False
        # the event loop's
        self._streams = Streams(self._send_cancel, self._patience, config.max_messages_per_second)
        # from thread to loop
        self._outbox: deque[list[RequestOutput]] = deque()
        self._is_delivery_pending = False
        self._progress = 0

    @property
    def load(self) -> Load:
        """How busy the engine is, with requests that its thread has not seen yet."""
        return self._load

    @property
    def refusal(self) -> EngineError | None:
        """Why new requests are refused whatever they ask: loading, draining, lost; else None."""
        return self._refusal

    async def start(self) -> Runner:
        """Load and warm up in the engine thread, then serve; raises what the loading raises."""
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[Runner] = self._loop.create_future()
        # A daemon, because a load or a step that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._main, args=(ready,), name="nanoinfer-engine", daemon=True
        )
        self._thread.start()
        runner = await ready
        self._watchdog = self._start_task("watchdog", self._watch)
        self._refusal = None
        return runner

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Take the completions of one client's request, all or none; closing the stream cancels.

        Raises the `refusal`, CapacityError, or QueueFullError: at once, and before anything runs.
        """
        with self._condition:
            if self._refusal is not None:
                raise self._refusal
            for request in requests:
                self.capacity.check(len(request.prompt_token_ids), request.stopping.max_tokens)
            self._load = self._with_room(requests)
            self._inbox.append(tuple(requests))
            self._condition.notify()
        if self._streams.is_empty:
            self._progress = time.monotonic_ns()  # the watchdog counts from here
        return self._streams.open(requests)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and finish the admitted; those that last longer are ended."""
        error = DrainingError("the server is shutting down")
        self._refusal = self._refusal or error
        try:
            async with asyncio.timeout(seconds):
                await self._streams.wait_empty()
        except TimeoutError:
            self._streams.cancel_all(error)

    async def stop(self) -> None:
        """End the thread after its present step; what is live then ends with DrainingError."""
        self._refusal = self._refusal or DrainingError("the server has stopped")
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)
        self._deliver()
        self._streams.abandon(self._refusal)

    # ---- the engine thread

    def step(self) -> None:
        """One step: schedule → execute → update, and the inbox before each."""
        if early := self._take_inbox() + self._scheduler.expire():
            self._publish(early)
        batch = self._scheduler.schedule()
        self._statistics.record_started(self._scheduler.take_started())
        if batch is not None:
            self._publish_load()
        try:
            step = self._pipeline.advance(batch)
        except Exception as error:
            self._lose_step(error)
            return
        if step is None:
            return
        # A cancel that arrived during the step is served before the step's outputs.
        outputs = self._take_inbox()
        outputs += self._scheduler.update(step.batch, step.results, step.timing.kind)
        self._statistics.record_step(step)
        self._publish(outputs)

    def _main(self, ready: asyncio.Future[Runner]) -> None:
        try:
            self._runner = self._load_runner()
            self._pipeline = Pipeline(self._runner)
            seconds = self._runner.warm_up()
            kv_tokens = self._runner.num_blocks * self._runner.block_size
            self.capacity = Capacity(self._runner.max_model_len, kv_tokens)
            self._scheduler = Scheduler(self.config, self.capacity)
            self._statistics = self._make_statistics(self._runner.max_model_len)
            self.statistics = self._statistics.snapshot(0)
        except BaseException as error:
            self._on_loop(_resolve, ready, error)
            return
        _LOG.info("warmed up in %.2f s, %d tokens of KV cache", seconds, kv_tokens)
        self._on_loop(_resolve, ready, self._runner)
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as error:
            _LOG.exception("the engine is lost")
            lost = EngineLostError("the engine failed")
            with self._condition:
                self._refusal = lost
            self._on_loop(self._listener.lost, error)  # health first
            self._on_loop(self._streams.abandon, lost)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work, a step in flight included; False when the thread shall end."""
        is_busy = self._scheduler.has_work or self._pipeline.is_busy
        with self._condition:
            while not (is_busy or self._inbox or self._stopping):
                self._condition.wait()
                self._pipeline.resume()
            return not self._stopping

    def _lose_step(self, error: Exception) -> None:
        """A step failed as a whole: retry it smaller, or end what ran; a lost device is fatal."""
        _LOG.error("a step failed", exc_info=error)
        if is_device_error(error):
            raise error
        is_retried = is_memory_error(error) and self._scheduler.retry_smaller()
        self._statistics.record_failed_step(is_retried)
        if is_retried:
            return
        lost = EngineLostError("a step of the engine failed")
        lost.__cause__ = error
        self._publish(self._scheduler.fail_running(lost))

    def _take_inbox(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        with self._condition:
            while self._inbox:
                command = self._inbox.popleft()
                if isinstance(command, _Cancel):
                    error, reason = command.error, command.reason
                    ended = [self._scheduler.cancel(r, error, reason) for r in command.requests]
                    outputs += [output for output in ended if output is not None]
                else:
                    self._statistics.record_accepted(command)
                    for request in command:
                        self._scheduler.add(request)
            self._load = self._scheduler.load
        return outputs

    def _publish(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs and figures to the event loop, with one wake-up for all that is pending."""
        self._statistics.record_outputs(outputs)
        self._publish_load()
        self.statistics = self._statistics.snapshot(self._scheduler.num_preemptions)
        self._progress = time.monotonic_ns()
        if outputs:
            self._outbox.append(outputs)
            if not self._is_delivery_pending:
                self._is_delivery_pending = True
                self._on_loop(self._deliver)

    def _publish_load(self) -> None:
        with self._condition:
            pending = [r for command in self._inbox if isinstance(command, tuple) for r in command]
            self._load = self._scheduler.load.with_waiting(pending)

    def _on_loop(self, function: Callable[[*Ts], None], *arguments: *Ts) -> None:
        # The loop is closed only where the process ends without waiting for this thread.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    # ---- the event loop

    async def _watch(self) -> None:
        await watch_progress(
            self._patience.step_seconds,
            lambda: None if self._streams.is_empty else self._progress,
            self._report_stall,
            self._is_stalled,
        )

    def _report_stall(self, is_stalled: bool) -> None:
        self._listener.stalled(is_stalled)
        self._is_stalled = is_stalled

    def _with_room(self, requests: Sequence[Request]) -> Load:
        """The load with these requests; raises QueueFullError if they do not fit the queue."""
        load = self._load.with_waiting(requests)
        if bound := load.bound_beyond(self.config):
            self.rejections[bound] += 1
            rate = self.statistics.tokens_per_second or _UNKNOWN_RATE
            seconds = self._load.waiting_prompt_tokens / rate
            raise QueueFullError(bound, min(max(seconds, _MIN_RETRY), _MAX_RETRY))
        return load

    def _send_cancel(
        self,
        requests: tuple[Request, ...],
        error: Exception | None = None,
        reason: FinishReason = FinishReason.CANCELLED,
    ) -> None:
        with self._condition:
            self._inbox.append(_Cancel(requests, error, reason))
            self._condition.notify()

    def _deliver(self) -> None:
        self._is_delivery_pending = False  # first: what is appended from now on wakes us again
        while self._outbox:
            self._streams.deliver(self._outbox.popleft())


def _start_task(name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    async def run() -> None:
        await work()

    return asyncio.get_running_loop().create_task(run(), name=name)


def _resolve(ready: asyncio.Future[Runner], result: Runner | BaseException) -> None:
    if ready.done():  # the start was cancelled
        return
    if isinstance(result, BaseException):
        ready.set_exception(result)
    else:
        ready.set_result(result)
