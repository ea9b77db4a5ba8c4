"""Keeps a device busy: step N+1 is launched before the results of step N are read.

Tells the host's time from the device's. What its thread does between two calls of `advance` is the
host's too: it updates, publishes and plans there, unless `resume` says that there was no work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from nanoinfer_engine.core.batch import Batch, EndedStep, Runner, Step, StepTiming

_SECONDS = 1e-9


@dataclass(frozen=True)
class _Launched:
    """A step in flight: when its launch began and was over; whether there was work before it."""

    batch: Batch
    step: Step
    began: int
    over: int
    follows: bool


class Pipeline:
    """One step in flight where the runner runs ahead, none where it does not."""

    def __init__(self, runner: Runner, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Nothing is in flight; `clock` gives monotonic nanoseconds."""
        self._runner = runner
        self._clock = clock
        self._in_flight: _Launched | None = None
        self._last_ended = 0
        self._device_free = 0  # where the host itself computes
        self.resume()

    @property
    def is_busy(self) -> bool:
        """Whether a step is in flight."""
        return self._in_flight is not None

    def resume(self) -> None:
        """There was no work until now: the time before is neither the host's nor idle."""
        self._left, self._host, self._follows = self._clock(), 0, False

    def advance(self, batch: Batch | None) -> EndedStep | None:
        """Begin `batch`, if there is one, and return the step whose turn it is to end.

        None where the pipeline has only just been filled. An exception concerns all that is in
        flight, `batch` too, and empties the pipeline.
        """
        self._host += self._clock() - self._left
        before, self._in_flight = self._in_flight, None
        try:
            launched = None if batch is None else self._launch(batch)
            if not self._runner.runs_ahead:
                before, launched = launched, None
            ended = None if before is None else self._end(before)
            self._in_flight = launched
            return ended
        finally:
            self._left = self._clock()

    def _launch(self, batch: Batch) -> _Launched:
        runner, follows, began = self._runner, self._follows, self._clock()
        self._follows = True
        return _Launched(batch, runner.launch(batch), began, self._clock(), follows)

    def _end(self, launched: _Launched) -> EndedStep:
        reading = self._clock()
        results = launched.step.results()
        own, now = launched.step.timing(), self._clock()
        timing = self._timing(launched, own)
        host, self._host = self._host * _SECONDS, 0
        host += max((now - reading) * _SECONDS - timing.waited, 0.0)
        if own is not None:
            host += (launched.over - launched.began) * _SECONDS
        self._device_free = launched.over
        started, self._last_ended = max(launched.began, self._last_ended), now
        return EndedStep(launched.batch, results, started, now, timing, host)

    def _timing(self, launched: _Launched, own: StepTiming | None) -> StepTiming:
        """What the step says itself, or the host's clock; without work nobody is idle."""
        if own is None:
            idle = max(launched.began - self._device_free, 0) * _SECONDS
            own = StepTiming("eager", (launched.over - launched.began) * _SECONDS, idle)
        return own if launched.follows else replace(own, idle=0.0)
