"""The embedded OTLP receiver with a real exporter on the other side."""

from __future__ import annotations

import grpc
import pytest
from nanoinfer.cli.collector import MAX_SPANS_PER_TRACE, MAX_TRACES, Collector, fetch
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode


def test_spans_come_back_as_they_were_exported() -> None:
    with Collector() as collector:
        provider = TracerProvider(resource=Resource({"service.name": "nanoinfer-engine"}))
        exporter = OTLPSpanExporter(endpoint=f"http://{collector.address}", insecure=True)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        tracer = provider.get_tracer("test")
        with (
            tracer.start_as_current_span("outer", kind=SpanKind.SERVER) as outer,
            tracer.start_as_current_span("inner") as inner,
        ):
            inner.set_attributes({"a": 1, "b": 0.5, "c": "x", "d": True, "e": ["y", "z"]})
            inner.add_event("first_token")
            inner.set_status(StatusCode.ERROR)
        provider.shutdown()
        trace_id = f"{outer.get_span_context().trace_id:032x}"
        spans = {span.name: span for span in fetch(collector.address, trace_id)}
        assert fetch(collector.address, "00" * 16) == []
    assert spans["outer"].kind == "server"
    assert spans["outer"].service == "nanoinfer-engine"
    assert spans["outer"].parent_id == b""
    assert not spans["outer"].failed
    assert spans["inner"].parent_id == spans["outer"].span_id
    assert spans["inner"].attributes == {"a": 1, "b": 0.5, "c": "x", "d": True, "e": ["y", "z"]}
    assert [name for _, name in spans["inner"].events] == ["first_token"]
    assert spans["inner"].failed
    assert spans["outer"].start <= spans["inner"].start <= spans["inner"].end


def exported(*spans: trace_pb2.Span) -> trace_service_pb2.ExportTraceServiceRequest:
    groups = [trace_pb2.ResourceSpans(scope_spans=[trace_pb2.ScopeSpans(spans=spans)])]
    return trace_service_pb2.ExportTraceServiceRequest(resource_spans=groups)


def test_memory_is_bounded() -> None:
    with Collector() as collector:
        for number in range(MAX_TRACES + 5):
            span = trace_pb2.Span(trace_id=number.to_bytes(16, "big"), span_id=b"12345678")
            collector.Export(exported(span), None)
        oldest, newest = (5).to_bytes(16, "big"), (MAX_TRACES + 4).to_bytes(16, "big")
        assert fetch(collector.address, (4).to_bytes(16, "big").hex()) == []
        assert len(fetch(collector.address, oldest.hex())) == 1
        many = [trace_pb2.Span(trace_id=newest, name="n")] * (MAX_SPANS_PER_TRACE + 10)
        collector.Export(exported(*many), None)
        assert len(fetch(collector.address, newest.hex())) == MAX_SPANS_PER_TRACE


def test_nobody_there() -> None:
    with pytest.raises(grpc.RpcError) as caught:
        fetch("127.0.0.1:1", "00" * 16, timeout=2)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
