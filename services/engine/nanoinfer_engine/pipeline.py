"""Keeps a device busy: step N+1 is launched before the results of step N are read."""

from __future__ import annotations

import time
from dataclasses import dataclass

from nanoinfer_engine.batch import Batch, RowResult, Runner, Step


@dataclass(frozen=True)
class EndedStep:
    """What ran and what came of it; monotonic nanoseconds, from when it had the device."""

    batch: Batch
    results: list[RowResult]
    started: int
    ended: int


class Pipeline:
    """One step in flight where the runner runs ahead, none where it does not."""

    def __init__(self, runner: Runner) -> None:
        """Nothing is in flight."""
        self._runner = runner
        self._in_flight: tuple[Batch, Step, int] | None = None
        self._last_ended = 0

    @property
    def is_busy(self) -> bool:
        """Whether a step is in flight."""
        return self._in_flight is not None

    def advance(self, batch: Batch | None) -> EndedStep | None:
        """Begin `batch`, if there is one, and return the step whose turn it is to end.

        None where the pipeline has only just been filled. An exception concerns all that is in
        flight, `batch` too, and empties the pipeline.
        """
        before, self._in_flight = self._in_flight, None
        started = time.monotonic_ns()
        if not self._runner.runs_ahead:
            return None if batch is None else self._end(batch, self._runner.execute(batch), started)
        launched = None if batch is None else (batch, self._runner.launch(batch), started)
        ended = None if before is None else self._end(before[0], before[1].results(), before[2])
        self._in_flight = launched
        return ended

    def _end(self, batch: Batch, results: list[RowResult], started: int) -> EndedStep:
        started, self._last_ended = max(started, self._last_ended), time.monotonic_ns()
        return EndedStep(batch, results, started, self._last_ended)
