"""The spans of a request: queue, prefill and decode under the engine's server span."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_common import telemetry
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.engine.control.conftest import Engine, StartFake
from tests.engine.fakes import FakeRunner

TEN = pb.StoppingParams(max_tokens=10)
GENERATE = "nanoinfer.v1.EngineService/Generate"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    found = [s for s in exporter.get_finished_spans() if "GetLoad" not in s.name]
    assert len({span.name for span in found}) == len(found)
    return {span.name: span for span in found}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


async def test_phases_hang_under_the_server_span_and_add_up(
    spans: InMemorySpanExporter, start_fake: StartFake
) -> None:
    async with start_fake(FakeRunner(step_seconds=0.005)) as engine:
        began = time.time()
        answer = await engine.generate(list(range(10, 50)), stopping=TEN)
        await engine.idle()
        spent = time.time() - began
        found = by_name(spans)
        assert set(found) == {GENERATE, "queue", "prefill", "decode"}
        server = found[GENERATE]
        for name in ("queue", "prefill", "decode"):
            assert found[name].parent == server.context
        attributes = server.attributes or {}
        total = sum(seconds(found[name]) for name in ("queue", "prefill", "decode"))
        assert total == pytest.approx(attributes["gen_ai.latency.e2e"], abs=1e-6)
        assert total < seconds(server) < spent
        assert seconds(found["prefill"]) == pytest.approx(
            attributes["gen_ai.latency.time_in_model_prefill"], abs=1e-6
        )
        assert answer.summary.timings.decode_ns / 1e9 == pytest.approx(
            seconds(found["decode"]), abs=1e-6
        )
        assert attributes["nanoinfer.engine.step.count"] == 12
        assert attributes["nanoinfer.engine.graph.replays"] == 0
        assert attributes["nanoinfer.engine.batch.max"] == 1
        assert attributes["nanoinfer.engine.kv.blocks"] == 13
        assert attributes["nanoinfer.engine.preemptions"] == 0
        assert (found["queue"].attributes or {})["nanoinfer.queue.waiting_at_arrival"] == 0
        assert (found["prefill"].attributes or {})["nanoinfer.prefill.chunks"] == 3
        assert (found["prefill"].attributes or {})["nanoinfer.prefill.cached_tokens"] == 0
        assert [event.name for event in found["prefill"].events] == ["first_token"]
        assert found["decode"].events == ()


async def test_the_prefill_says_what_came_from_the_cache(
    spans: InMemorySpanExporter, fake: Engine
) -> None:
    await fake.generate(list(range(10, 50)), stopping=TEN)
    await fake.idle()
    spans.clear()
    await fake.generate(list(range(10, 50)), stopping=TEN)
    await fake.until(lambda _: "decode" in by_name(spans))
    attributes = by_name(spans)["prefill"].attributes or {}
    assert attributes["nanoinfer.prefill.cached_tokens"] == 36
    assert attributes["nanoinfer.prefill.chunks"] == 1


async def test_a_cancelled_request_shows_how_far_it_came(
    spans: InMemorySpanExporter, start_fake: StartFake
) -> None:
    async with start_fake(FakeRunner(step_seconds=0.005)) as engine:
        call = engine.call()
        await call.read()
        call.cancel()
        await engine.idle()
        await engine.until(lambda _: "decode" in by_name(spans))
        found = by_name(spans)
        assert [event.name for event in found["decode"].events] == ["aborted"]
        assert found["decode"].parent == found[GENERATE].context


async def test_a_request_that_never_ran_has_a_queue_span_alone(
    spans: InMemorySpanExporter, start_fake: StartFake
) -> None:
    async with start_fake(FakeRunner(step_seconds=0.01), max_batch_requests=1) as engine:
        first = engine.call(stopping=pb.StoppingParams(max_tokens=30))
        await engine.until(lambda load: load.running_requests == 1)
        second = engine.call(stopping=TEN)
        await engine.until(lambda load: load.waiting_requests == 1)
        second.cancel()
        await engine.until(lambda load: load.waiting_requests == 0)
        await engine.until(lambda _: "queue" in by_name(spans))
        found = by_name(spans)
        assert set(found) == {GENERATE, "queue"}
        assert [event.name for event in found["queue"].events] == ["aborted"]
        first.cancel()


async def test_preemptions_are_events_of_the_decode(
    spans: InMemorySpanExporter, start_fake: StartFake
) -> None:
    async with start_fake(FakeRunner(num_blocks=5)) as engine:
        await engine.generate(
            [11, 12, 13, 14, 15],
            sampling=pb.SamplingParams(n=2),
            stopping=pb.StoppingParams(max_tokens=12),
        )
        found = by_name(spans)
        names = [event.name for event in found["decode"].events]
        assert names[:2] == ["preempted", "resumed"]
        attributes = found[GENERATE].attributes or {}
        assert attributes["nanoinfer.engine.preemptions"] == names.count("preempted")


async def test_a_refused_request_has_no_phases(spans: InMemorySpanExporter, fake: Engine) -> None:
    await fake.refused(fake.generate([]))
    assert set(by_name(spans)) == {GENERATE}
