"""Times of steps in the exported metrics: busy and idle device, host."""

from __future__ import annotations

import pytest
from nanoinfer_engine.core.batch import Batch, BatchRow, EndedStep, RowResult, StepKind, StepTiming
from nanoinfer_engine.core.engine import Engine
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.server.metrics import EngineCollector, Facts, make_statistics
from prometheus_client.core import Metric

from tests.engine.control.test_running_ahead import AheadRunner
from tests.engine.fakes import (
    GREEDY,
    FakeClock,
    FakeListener,
    FakeRunner,
    make_config,
    make_request,
)

BATCH = Batch((BatchRow((5, 6), 0, (0,), samples=True, sampling=GREEDY),))


class SlowRunner(FakeRunner):
    """A step takes 3 s, and there is no device."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock

    def execute(self, batch: Batch) -> list[RowResult]:
        self.clock.advance(3)
        return super().execute(batch)


class TimedStep:
    """A step whose results take the host 2 s to read, after it waited."""

    def __init__(self, clock: FakeClock, timing: StepTiming, results: list[RowResult]) -> None:
        self.clock, self.own, self.row_results = clock, timing, results

    def results(self) -> list[RowResult]:
        self.clock.advance(2 + self.own.waited)
        return self.row_results

    def timing(self) -> StepTiming:
        return self.own


class TimedRunner(FakeRunner):
    """Launches within 1 s; the times of its device are given beforehand."""

    runs_ahead = True

    def __init__(self, clock: FakeClock, timings: list[StepTiming]) -> None:
        super().__init__()
        self.clock, self.timings = clock, timings

    def launch(self, batch: Batch) -> TimedStep:
        self.clock.advance(1)
        return TimedStep(self.clock, self.timings.pop(0), self.execute(batch))


def graph(busy: float, idle: float, waited: float = 0.0) -> StepTiming:
    return StepTiming("graph", busy, idle, waited)


def advance(pipeline: Pipeline, batch: Batch | None = BATCH) -> EndedStep:
    step = pipeline.advance(batch)
    assert step is not None
    return step


def test_without_a_device_executing_is_busy_and_the_rest_is_idle() -> None:
    clock = FakeClock()
    pipeline = Pipeline(SlowRunner(clock), clock)
    clock.advance(0.5)
    first = advance(pipeline)
    clock.advance(0.25)
    second = advance(pipeline)
    assert first.timing == StepTiming("eager", 3, 0)  # nothing ran before
    assert first.host == pytest.approx(0.5)
    assert second.timing.busy == pytest.approx(3)
    assert second.timing.idle == second.host == pytest.approx(0.25)


def test_time_without_work_is_neither_idle_nor_the_hosts() -> None:
    clock = FakeClock()
    pipeline = Pipeline(SlowRunner(clock), clock)
    advance(pipeline)
    clock.advance(100)
    pipeline.resume()
    clock.advance(0.25)
    step = advance(pipeline)
    assert step.timing.idle == 0
    assert step.host == pytest.approx(0.25)


def test_the_host_works_while_the_device_does_and_waiting_is_not_work() -> None:
    clock = FakeClock()
    timings: list[StepTiming] = [graph(7, 50), graph(8, 0.5, waited=4), graph(9, 0.125)]
    pipeline = Pipeline(TimedRunner(clock, timings), clock)
    clock.advance(0.25)
    assert pipeline.advance(BATCH) is None
    clock.advance(0.5)
    first = advance(pipeline)
    assert first.timing == graph(7, 0)  # what was before is not known to have been work
    assert first.host == pytest.approx(0.25 + 0.5 + 1 + 2)
    clock.advance(0.5)
    second = advance(pipeline)
    assert second.timing == graph(8, 0.5, waited=4)
    assert second.host == pytest.approx(0.5 + 1 + 2)
    third = advance(pipeline, None)
    assert third.timing == graph(9, 0.125)
    assert third.host == pytest.approx(1 + 2)
    assert not pipeline.is_busy


def ended(kind: StepKind, busy: float, idle: float, host: float = 0.001) -> EndedStep:
    return EndedStep(BATCH, [None], 0, int(busy * 1e9), StepTiming(kind, busy, idle), host)


def families(steps: list[EndedStep]) -> dict[str, Metric]:
    statistics = make_statistics(256)
    for step in steps:
        statistics.record_step(step)
    snapshot = statistics.snapshot(0)
    load = Engine(make_config(), FakeRunner, make_statistics, FakeListener([])).load
    facts = Facts("m", 4, 8, {"requests": 0, "tokens": 0, "bytes": 0}, load, snapshot)
    return {family.name: family for family in EngineCollector("vllm:", lambda: facts).collect()}


def counts(family: Metric) -> dict[str, float]:
    return {
        sample.labels["kind"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_count")
    }


def test_kinds_and_times_are_counted() -> None:
    assert counts(families([])["nanoinfer_engine_step_seconds"]) == {"eager": 0, "graph": 0}
    found = families([ended("eager", 0.3, 0.1, 0.002), *[ended("graph", 0.1, 0.1, 0.004)] * 3])
    assert counts(found["nanoinfer_engine_step_seconds"]) == {"eager": 1, "graph": 3}
    assert found["nanoinfer_engine_graph_replays"].samples[0].value == 3
    busy = found["nanoinfer_engine_device_busy_seconds"].samples[0]
    assert (busy.name, busy.value) == (
        "nanoinfer_engine_device_busy_seconds_total",
        pytest.approx(0.6),
    )
    assert found["nanoinfer_engine_device_idle_seconds"].samples[0].value == pytest.approx(0.4)
    host = found["nanoinfer_engine_step_host_seconds"]
    values = {sample.name.rpartition("_")[2]: sample.value for sample in host.samples}
    assert values["sum"] == pytest.approx(0.014)
    assert values["count"] == 4


def test_the_idle_share_is_that_of_recent_steps() -> None:
    busy, idle = [ended("graph", 0.01, 0)] * 500, [ended("graph", 0.01, 0.01)] * 500
    found = families(busy + idle)
    share = found["nanoinfer_engine_device_idle_share"].samples[0].value
    assert share == pytest.approx(0.5, abs=0.01)


def test_a_request_counts_its_graph_replays() -> None:
    from nanoinfer_engine.core.capacity import Capacity
    from nanoinfer_engine.core.scheduler import Scheduler

    runner = AheadRunner()
    scheduler = Scheduler(make_config(), Capacity(256, 256))
    request = make_request(max_tokens=3)
    scheduler.add(request)
    for kind in ("eager", "graph", "graph"):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.update(batch, runner.execute(batch), kind)  # type: ignore[arg-type]
    assert (request.num_steps, request.num_graph_replays) == (3, 2)
