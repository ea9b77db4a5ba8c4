"""When a CUDA device began and ended a step: two events around it, read once it has ended."""

from __future__ import annotations

import time

import torch

from nanoinfer_engine.core.batch import StepKind, StepTiming


class StepEvents:
    """A step's begin and end on the device, and the end of the step before."""

    def __init__(
        self,
        kind: StepKind,
        begin: torch.cuda.Event,
        end: torch.cuda.Event,
        before: torch.cuda.Event | None,
    ) -> None:
        """All of them recorded, in one stream."""
        self._kind: StepKind = kind
        self._begin, self.end, self._before = begin, end, before
        self._waited = 0.0

    def wait(self) -> None:
        """Wait until the step has ended."""
        began = time.perf_counter()
        self.end.synchronize()
        self._waited += time.perf_counter() - began

    def timing(self) -> StepTiming:
        """After `wait`: what the device did; idle is 0 for the first step of all."""
        before = self._begin if self._before is None else self._before
        idle, busy = before.elapsed_time(self._begin), self._begin.elapsed_time(self.end)
        return StepTiming(self._kind, 1e-3 * busy, 1e-3 * idle, self._waited)


class DeviceClock:
    """Records the events of one step after another on the current stream."""

    def __init__(self) -> None:
        """No step has run."""
        self._begin: torch.cuda.Event | None = None
        self._last_end: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Just before the step's first copy or launch: until here the device had nothing to do."""
        self._begin = _recorded()

    def end(self, kind: StepKind) -> StepEvents:
        """Just after its last; call `begin` before."""
        begin, before, end = self._begin, self._last_end, _recorded()
        if begin is None:
            raise RuntimeError("end without begin")
        self._begin, self._last_end = None, end
        return StepEvents(kind, begin, end, before)


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
