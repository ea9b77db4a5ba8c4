"""Spans, their attributes and the metrics, for every way in which a request can end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2
from nanoinfer_gateway.service import GatewayService
from nanoinfer_gateway.settings import GatewaySettings
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.gateway.fakes import (
    FakeEngine,
    FakeTokenizer,
    Gateway,
    endless,
    eventually,
    gateway,
    ids_of,
    serving,
    tell,
)
from tests.gateway.test_service import chat

GENERATE = "nanoinfer.v1.GatewayService/Generate"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Spans of this test alone, whatever provider the process has."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield memory
    provider.shutdown()


async def finished(exporter: InMemorySpanExporter, server_span: str) -> dict[str, ReadableSpan]:
    """The spans of the request, by name, once its server span has ended."""
    await eventually(lambda: any(s.name == server_span for s in exporter.get_finished_spans()))
    spans = exporter.get_finished_spans()
    root = next(span for span in spans if span.name == server_span)
    assert root.context is not None
    trace_id = root.context.trace_id
    return {s.name: s for s in spans if s.context is not None and s.context.trace_id == trace_id}


def parent_of(spans: dict[str, ReadableSpan], name: str) -> str | None:
    parent = spans[name].parent
    if parent is None:
        return None
    return next(n for n, s in spans.items() if s.context and s.context.span_id == parent.span_id)


async def test_a_chat_draws_the_tree(
    exporter: InMemorySpanExporter,
    running_gateway: Gateway,
    tokenizer: FakeTokenizer,
    engine: FakeEngine,
) -> None:
    options = pb.GenerationOptions(
        sampling=generation_pb2.SamplingParams(temperature=0, n=2, seed=2**64 - 1),
        stopping=generation_pb2.StoppingParams(max_tokens=9),
        stop=["world"],
    )
    request = pb.GatewayServiceChatStreamRequest(messages=chat("secret"), options=options)
    call = running_gateway.stub.ChatStream(request, metadata=(("x-request-id", "r-9"),))
    async for _ in call:
        pass
    server, encode, engine_call = (
        "nanoinfer.v1.GatewayService/ChatStream",
        "nanoinfer.v1.TokenizerService/RenderChat",
        "nanoinfer.v1.EngineService/Generate",
    )
    spans = await finished(exporter, server)
    assert {name: parent_of(spans, name) for name in spans} == {
        server: None,
        encode: server,
        engine_call: server,
        "detokenize": server,
    }
    attributes = dict(spans[server].attributes or {})
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nanoinfer",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": str(2**64 - 1),
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.temperature": 0.0,
        "nanoinfer.request.stop_count": 1,
        "gen_ai.output.type": "text",
        "gen_ai.response.id": "r-9",
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.input_tokens": len("user:secret\n"),
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "rpc.response.status_code": "OK",
    }
    assert {key: attributes.get(key) for key in expected} == expected
    assert "gen_ai.request.top_p" not in attributes
    assert 0 < float(str(attributes["gen_ai.response.time_to_first_chunk"])) < 5
    detokenize = dict(spans["detokenize"].attributes or {})
    assert detokenize["nanoinfer.stop.matched"] is True
    assert float(str(detokenize["nanoinfer.detokenize.duration"])) > 0
    assert not any("secret" in str(span.attributes) for span in spans.values())
    # the context went on, so the services behind join the trace
    context = spans[encode].context
    assert context is not None
    traceparent = tokenizer.calls[-1][2]["traceparent"]
    assert traceparent.split("-")[1] == trace.format_trace_id(context.trace_id)
    assert traceparent.split("-")[2] == trace.format_span_id(context.span_id)
    assert engine.metadata[0]["traceparent"].split("-")[1] == traceparent.split("-")[1]
    assert dict(await call.trailing_metadata())["x-trace-id"] == traceparent.split("-")[1]


async def test_background_calls_make_no_endless_spans(
    exporter: InMemorySpanExporter, running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.report(running_requests=1)
    await asyncio.sleep(0.05)
    assert not any("Watch" in span.name for span in exporter.get_finished_spans())


async def test_a_cancelled_request_says_how_far_it_came(
    exporter: InMemorySpanExporter, running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    call = running_gateway.stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi"))
    for _ in range(3):
        await call.read()
    call.cancel()
    spans = await finished(exporter, f"{GENERATE}Stream")
    attributes = dict(spans[f"{GENERATE}Stream"].attributes or {})
    assert attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert int(str(attributes["gen_ai.usage.output_tokens"])) >= 1
    assert attributes["rpc.response.status_code"] == "CANCELLED"
    assert "detokenize" in spans


async def test_a_refused_request_has_its_reason_and_no_children(
    exporter: InMemorySpanExporter, running_gateway: Gateway
) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await running_gateway.stub.Generate(pb.GatewayServiceGenerateRequest())
    spans = await finished(exporter, GENERATE)
    assert list(spans) == [GENERATE]
    assert dict(spans[GENERATE].attributes or {})["nanoinfer.error.reason"] == "INVALID_PROMPT"


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> list[GatewayService]:
    """Every gateway service that is made, to read its registry."""
    made: list[GatewayService] = []
    original = GatewayService.__init__

    def remember(self: GatewayService, settings: GatewaySettings, status: Any) -> None:
        original(self, settings, status)
        made.append(self)

    monkeypatch.setattr(GatewayService, "__init__", remember)
    return made


@pytest.fixture
async def bounded(
    service: list[GatewayService], tokenizer: FakeTokenizer, engine: FakeEngine
) -> AsyncIterator[tuple[Gateway, GatewayService]]:
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], max_requests=1) as running,
    ):
        yield running, service[0]


@pytest.mark.matrix("R1")
async def test_every_request_ends_in_exactly_one_outcome(
    bounded: tuple[Gateway, GatewayService], engine: FakeEngine
) -> None:
    running, service = bounded
    engine.behaviour = tell(ids_of(b"Hello"))
    request = pb.GatewayServiceGenerateRequest(text="hi")
    await running.stub.Generate(request)
    await running.stub.Generate(request)
    engine.behaviour = endless()
    held = running.stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi"))
    await held.read()

    def value(name: str, **labels: str) -> float:
        return service.registry.get_sample_value(name, labels) or 0.0

    requests = "nanoinfer_gateway_requests_total"
    assert value("nanoinfer_gateway_inflight", method="GenerateStream") == 1
    with pytest.raises(grpc.aio.AioRpcError):
        await running.stub.Generate(request)
    held.cancel()
    await eventually(lambda: value("nanoinfer_gateway_inflight", method="GenerateStream") == 0)
    with pytest.raises(grpc.aio.AioRpcError):
        await running.stub.Generate(pb.GatewayServiceGenerateRequest())
    assert value(requests, method="Generate", outcome="success", reason="") == 2
    assert value(requests, method="Generate", outcome="error", reason="QUEUE_FULL") == 1
    assert value(requests, method="Generate", outcome="error", reason="INVALID_PROMPT") == 1
    assert value(requests, method="GenerateStream", outcome="cancelled", reason="") == 1
    total = sum(
        sample.value
        for metric in service.registry.collect()
        for sample in metric.samples
        if sample.name == requests
    )
    assert total == 5
    rejections = "nanoinfer_gateway_admission_rejections_total"
    assert value(rejections, reason="requests") == 1
    assert value("nanoinfer_gateway_time_to_first_token_seconds_count") == 3
    assert value("nanoinfer_gateway_request_duration_seconds_count", method="Generate") == 4
    assert value("nanoinfer_gateway_upstream_duration_seconds_count", upstream="engine") == 3


async def test_nothing_is_held_after_a_burst(
    bounded: tuple[Gateway, GatewayService], engine: FakeEngine
) -> None:
    running, service = bounded
    engine.behaviour = tell(ids_of(b"Hello"), pause=0.02)

    async def one() -> str:
        try:
            answer = await running.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return str(answer.choices[0].text)

    outcomes = await asyncio.gather(*[one() for _ in range(20)])
    assert set(outcomes) == {"Hello", "RESOURCE_EXHAUSTED"}
    gate = service.gateway.admission
    assert (gate.num_requests, gate.num_prompt_tokens, gate.num_prompt_bytes) == (0, 0, 0)


async def test_no_task_and_no_generator_outlives_its_request(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    await running_gateway.stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="warm"))
    before = len(asyncio.all_tasks())
    request = pb.GatewayServiceGenerateStreamRequest(text="hi")
    calls = [running_gateway.stub.GenerateStream(request) for _ in range(10)]
    for call in calls:
        await call.read()
    for call in calls:
        call.cancel()
    await eventually(lambda: engine.num_running == 0)
    await eventually(lambda: len(asyncio.all_tasks()) <= before)
