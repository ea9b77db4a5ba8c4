"""Whose trace a call belongs to, and what is read from and sent as metadata."""

from typing import Any

import grpc
import pytest
from nanoinfer_common import telemetry
from nanoinfer_common.spans import incoming_trace
from nanoinfer_common.validation import read_metadata
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from tests.common.conftest import start_probe
from tests.common.probe import KINDS, call
from tests.common.test_interceptors import attributes, server_span, spans_of

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"

GARBAGE = {
    "none": [],
    "text": [("traceparent", "garbage")],
    "zero trace": [("traceparent", f"00-{'0' * 32}-{SPAN_ID}-01")],
    "zero span": [("traceparent", f"00-{TRACE_ID}-{'0' * 16}-01")],
    "forbidden version": [("traceparent", f"ff-{TRACE_ID}-{SPAN_ID}-01")],
    "twice": [("traceparent", PARENT), ("traceparent", PARENT)],
    "long state": [("traceparent", PARENT), ("tracestate", f"a={'x' * 10_000}")],
    "long parent": [("traceparent", PARENT * 100)],
    "only baggage": [("baggage", "a=b"), ("tracestate", "a=b")],
}


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_callers_trace_is_continued_or_linked(
    spans: InMemorySpanExporter, trusted: bool
) -> None:
    metadata = (("traceparent", PARENT), ("tracestate", "vendor=1"), ("baggage", "secret=1"))
    async with (
        start_probe(trust_incoming_trace=trusted) as probe,
        grpc.aio.insecure_channel(probe.server.address) as channel,
    ):
        await call(channel, "unary_unary", b"ok", metadata=metadata)
    span = await server_span(spans)
    if trusted:
        assert span.parent is not None
        assert trace.format_trace_id(span.context.trace_id) == TRACE_ID
        assert trace.format_span_id(span.parent.span_id) == SPAN_ID
        assert span.context.trace_state.get("vendor") == "1"
        assert list(span.links) == []
    else:
        assert span.parent is None
        assert trace.format_trace_id(span.context.trace_id) != TRACE_ID
        (link,) = span.links
        assert trace.format_trace_id(link.context.trace_id) == TRACE_ID
        assert trace.format_span_id(link.context.span_id) == SPAN_ID


@pytest.mark.matrix("R81")
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_ignored(name: str) -> None:
    assert incoming_trace(GARBAGE[name]) is None


# gRPC itself keeps one of two equal parents.
@pytest.mark.matrix("R81")
@pytest.mark.parametrize("name", sorted({*GARBAGE} - {"twice"}))
async def test_garbage_starts_a_trace(spans: InMemorySpanExporter, name: str) -> None:
    async with (
        start_probe(trust_incoming_trace=True) as probe,
        grpc.aio.insecure_channel(probe.server.address) as channel,
    ):
        # Over 8 KiB of metadata may be refused by gRPC itself, at random.
        metadata = tuple((key, value[:6000]) for key, value in GARBAGE[name])
        await call(channel, "unary_unary", b"ok", metadata=metadata)
    span = await server_span(spans)
    assert span.parent is None
    assert list(span.links) == []


@pytest.mark.parametrize("method", KINDS)
async def test_channels_inject_their_span_and_drop_baggage(
    spans: InMemorySpanExporter, method: str
) -> None:
    async with start_probe(trust_incoming_trace=True) as probe:
        outer = telemetry.tracer().start_span("outer")
        token = otel_context.attach(trace.set_span_in_context(outer))
        try:
            metadata = (("baggage", "secret=1"), ("x-request-id", "kept"), ("traceparent", "mine"))
            await call(probe.channel, method, b"ok", metadata=metadata)
        finally:
            otel_context.detach(token)
    span = await server_span(spans)
    (client,) = spans_of(spans, SpanKind.CLIENT)
    assert span.parent is not None
    assert client.parent is not None
    assert span.parent.span_id == client.context.span_id
    assert client.parent.span_id == outer.get_span_context().span_id
    assert attributes(span)["nanoinfer.request.id"] == "kept"


async def test_baggage_does_not_leave(spans: InMemorySpanExporter) -> None:
    seen: list[Any] = []

    async def look(request: bytes, context: Any) -> bytes:
        seen.extend(context.invocation_metadata())
        return request

    async with start_probe() as probe:
        probe.service.act = look  # type: ignore[method-assign]
        await call(probe.channel, "unary_unary", b"ok", metadata=(("baggage", "a=b"), ("k", "v")))
    keys = [key for key, _ in seen]
    assert "baggage" not in keys
    assert {"k", "traceparent"} <= set(keys)


async def test_a_call_that_cannot_connect_has_an_error_span(spans: InMemorySpanExporter) -> None:
    async with start_probe() as probe:
        channel = probe.channel
        await probe.channel.close(None)
        with pytest.raises(grpc.aio.UsageError):
            await call(channel, "unary_unary", b"ok")
    (client,) = spans_of(spans, SpanKind.CLIENT)
    assert attributes(client)["error.type"] == "UsageError"
    assert client.status.status_code is trace.StatusCode.ERROR


async def test_the_requests_own_id_labels_span_and_answer(
    spans: InMemorySpanExporter,
) -> None:
    async def label(request: bytes, context: Any) -> bytes:
        found = read_metadata(context.invocation_metadata(), "from-field")
        assert found.request_id == "from-field"
        telemetry.set_attributes({"nanoinfer.prompt.chars": 3, "extra": True})
        return request

    async with start_probe() as probe:
        probe.service.act = label  # type: ignore[method-assign]
        finished = await call(
            probe.channel, "unary_unary", b"ok", metadata=(("x-request-id", "from-metadata"),)
        )
    returned = dict(await finished.trailing_metadata())
    assert returned["x-request-id"] == "from-field"
    seen = attributes(await server_span(spans))
    assert seen["nanoinfer.request.id"] == "from-field"
    assert seen["nanoinfer.prompt.chars"] == 3
    assert seen["extra"] is True


async def test_without_tracing_the_callers_trace_passes_through() -> None:
    async with (
        start_probe(trust_incoming_trace=True) as probe,
        grpc.aio.insecure_channel(probe.server.address) as channel,
    ):
        finished = await call(channel, "unary_unary", b"ok", metadata=(("traceparent", PARENT),))
    assert dict(await finished.trailing_metadata())["x-trace-id"] == TRACE_ID


def test_outside_of_an_rpc_there_is_no_server_span() -> None:
    telemetry.set_attributes({"a": 1})
    assert not telemetry.server_span().get_span_context().is_valid
    assert telemetry.request_id() == ""
