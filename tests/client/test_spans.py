"""The client's own span and the context that travels."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import nanoinfer
import pytest
from nanoinfer import AsyncClient, Client
from opentelemetry import baggage, context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.client.fake_gateway import Behaviour
from tests.client.test_client import endless


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(target: str, exporter: InMemorySpanExporter) -> Iterator[Client]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with Client(target, tracer_provider=provider) as client:
        yield client


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def test_a_client_span_is_the_parent_upstream(
    traced: Client, exporter: InMemorySpanExporter, behaviour: Behaviour, target: str
) -> None:
    token = context.attach(baggage.set_baggage("secret", "1"))
    traced.stream("x").result()
    context.detach(token)
    span = only(exporter)
    assert span.name == "nanoinfer.v1.GatewayService/GenerateStream"
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    host, _, port = target.rpartition(":")
    assert span.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "nanoinfer.v1.GatewayService/GenerateStream",
        "rpc.response.status_code": "OK",
        "server.address": host,
        "server.port": int(port),
    }
    metadata = behaviour.arrivals[0].metadata
    ids = span.context
    parts = str(metadata["traceparent"]).split("-")
    assert parts[:3] == ["00", f"{ids.trace_id:032x}", f"{ids.span_id:016x}"]
    assert int(parts[3], 16) & 1
    assert "baggage" not in metadata


def test_a_failure_marks_the_span(
    traced: Client, exporter: InMemorySpanExporter, behaviour: Behaviour
) -> None:
    behaviour.unary = lambda request, context: context.abort(grpc.StatusCode.NOT_FOUND, "no")
    with pytest.raises(nanoinfer.NotFound):
        traced.generate("x")
    span = only(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "NOT_FOUND"
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"


@pytest.mark.parametrize("way", ["close", "until", "forget"])
def test_a_cancelled_stream_ends_its_span_once(
    traced: Client, exporter: InMemorySpanExporter, behaviour: Behaviour, way: str
) -> None:
    behaviour.stream = endless
    stream = traced.stream("x", until=(lambda text: True) if way == "until" else None)
    next(stream)
    if way == "close":
        stream.close()
        stream.close()
    del stream
    span = only(exporter)
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"


def test_without_an_sdk_no_context_travels(client: Client, behaviour: Behaviour) -> None:
    client.generate("x")
    assert "traceparent" not in behaviour.arrivals[0].metadata


async def test_the_async_client_makes_the_same_span(
    target: str, exporter: InMemorySpanExporter, behaviour: Behaviour
) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with AsyncClient(target, tracer_provider=provider) as client:
        await client.generate("x")
    span = only(exporter)
    assert span.name == "nanoinfer.v1.GatewayService/Generate"
    assert f"{span.context.span_id:016x}" in str(behaviour.arrivals[0].metadata["traceparent"])
