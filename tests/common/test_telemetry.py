"""Export to an OTLP collector, what happens without one, and spans made afterwards."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc
import pytest
from nanoinfer_common import telemetry
from nanoinfer_common.errors import StartError
from nanoinfer_common.telemetry import DROPPED_SPANS, BoundedSpanProcessor, SpanEvent
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import Counter


def num_counted(counter: Counter) -> float:
    return counter.collect()[0].samples[0].value


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    servicer = Collector()
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        yield servicer
        server.stop(None).wait()


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> list[TracerProvider]:
    """Catches the provider instead of making it the process's, which can be done once only."""
    caught: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", caught.append)
    return caught


def test_spans_arrive_with_their_resource(
    collector: Collector, provider: list[TracerProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=pod-1")
    flush = telemetry.configure_tracing("nanoinfer-engine")
    provider[0].get_tracer("t").start_span("one").end()
    flush()
    (resource_spans,) = collector.requests[0].resource_spans
    found = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
    assert found["service.name"] == "nanoinfer-engine"
    assert found["service.version"] == telemetry.product_version()
    assert len(found["service.instance.id"]) == 36
    assert found["k8s.pod.name"] == "pod-1"
    assert [span.name for span in resource_spans.scope_spans[0].spans] == ["one"]


def test_the_sampler_comes_from_the_environment(
    collector: Collector, provider: list[TracerProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    flush = telemetry.configure_tracing("nanoinfer-engine")
    provider[0].get_tracer("t").start_span("one").end()
    flush()
    assert collector.requests == []


def test_without_an_endpoint_nothing_is_set_up(provider: list[TracerProvider]) -> None:
    telemetry.configure_tracing("nanoinfer-engine")()
    assert provider == []


def test_other_protocols_are_refused(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(StartError, match="http/json"):
        telemetry.configure_tracing("nanoinfer-engine")


@pytest.mark.matrix("R72")
def test_an_absent_collector_costs_nothing_and_is_counted(
    provider: list[TracerProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    before = num_counted(DROPPED_SPANS)
    flush = telemetry.configure_tracing("nanoinfer-engine")
    for _ in range(10):
        provider[0].get_tracer("t").start_span("one").end()
    flush()
    while num_counted(DROPPED_SPANS) < before + 10:
        time.sleep(0.01)
    assert num_counted(DROPPED_SPANS) == before + 10


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A key and a certificate for 127.0.0.1 that no authority has signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    key, made = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(made), "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return key.read_bytes(), made.read_bytes()


@pytest.mark.matrix("R72")
@pytest.mark.parametrize("speaks", ["no TLS", "TLS of an unknown authority"])
def test_a_collector_with_other_tls_costs_nothing_and_is_counted(
    speaks: str,
    certificate: tuple[bytes, bytes],
    provider: list[TracerProvider],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servicer = Collector()
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
        if speaks == "no TLS":
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([certificate]))
        server.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"https://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        before = num_counted(DROPPED_SPANS)
        flush = telemetry.configure_tracing("nanoinfer-engine")
        for _ in range(10):
            provider[0].get_tracer("t").start_span("one").end()
        flush()
        while num_counted(DROPPED_SPANS) < before + 10:
            time.sleep(0.01)
        server.stop(None).wait()
    assert num_counted(DROPPED_SPANS) == before + 10
    assert servicer.requests == []


class StuckExporter(SpanExporter):
    """Blocks until released, as an exporter whose collector does not answer."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.num_exported = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.release.wait(60)
        self.num_exported += len(spans)
        return SpanExportResult.SUCCESS


@pytest.mark.matrix("R72")
def test_a_stuck_collector_bounds_memory_and_drops() -> None:
    exporter, dropped = StuckExporter(), Counter("dropped_spans", "d", registry=None)
    processor = BoundedSpanProcessor(exporter, dropped, max_queued=64)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("t")
    for _ in range(1000):
        tracer.start_span("s").end()
    assert exporter.num_exported == 0  # ending a span waits for no export
    # One batch may be with the exporter beside the queue.
    assert 1000 - 2 * 64 <= num_counted(dropped) <= 1000 - 64
    exporter.release.set()
    provider.shutdown()
    assert exporter.num_exported + num_counted(dropped) == 1000


def test_unsampled_spans_are_not_counted() -> None:
    dropped = Counter("dropped_spans", "d", registry=None)
    processor = BoundedSpanProcessor(InMemorySpanExporter(), dropped)
    processor.on_end(ReadableSpan("s", trace.SpanContext(1, 2, False)))
    processor.shutdown()
    assert num_counted(dropped) == 0


def test_spans_made_afterwards(spans: InMemorySpanExporter) -> None:
    parent = trace.SpanContext(7, 8, is_remote=True, trace_flags=trace.TraceFlags(1))
    events = [SpanEvent("first_token", 1500, {"n": 1}), SpanEvent("resumed", 1600)]
    telemetry.record_span(
        "prefill", 1000, 2000, attributes={"chunks": 3}, events=events, parent=parent
    )
    telemetry.record_span("alone", 5, 6, attributes={})
    with telemetry.tracer().start_as_current_span("outer") as outer:
        telemetry.record_span("inner", 5, 6, attributes={})
    made, alone, inner, _ = spans.get_finished_spans()
    assert (made.name, made.start_time, made.end_time) == ("prefill", 1000, 2000)
    assert dict(made.attributes or {}) == {"chunks": 3}
    assert [(event.name, event.timestamp) for event in made.events] == [
        ("first_token", 1500),
        ("resumed", 1600),
    ]
    assert made.parent == parent
    assert made.context.trace_id == 7
    assert alone.parent is None
    assert inner.parent == outer.get_span_context()
