"""Events around steps, with a device that is a clock."""

from __future__ import annotations

import pytest
import torch
from nanoinfer_engine.core.batch import StepTiming
from nanoinfer_engine.step.device_timing import DeviceClock


class FakeEvent:
    now = 0.0  # ms

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at

    def synchronize(self) -> None:
        FakeEvent.now += 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> DeviceClock:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return DeviceClock()


def step(clock: DeviceClock, gap: float, length: float) -> StepTiming:
    FakeEvent.now += gap
    clock.begin()
    FakeEvent.now += length
    return clock.end("graph").timing()


def test_idle_is_from_the_end_of_the_step_before(clock: DeviceClock) -> None:
    first, second = step(clock, 100, 3), step(clock, 2, 5)
    assert (first.busy, first.idle) == (pytest.approx(0.003), 0)
    assert (second.busy, second.idle) == (pytest.approx(0.005), pytest.approx(0.002))


def test_a_step_that_never_ended_is_no_step(clock: DeviceClock) -> None:
    step(clock, 0, 1)
    clock.begin()  # what launched then has failed
    after = step(clock, 4, 1)
    assert after.idle == pytest.approx(0.004)
    with pytest.raises(RuntimeError):
        clock.end("eager")


def test_waiting_is_told(clock: DeviceClock) -> None:
    clock.begin()
    events = clock.end("eager")
    assert events.timing().waited == 0
    events.wait()
    assert 0 < events.timing().waited < 0.5
    assert events.timing().kind == "eager"
