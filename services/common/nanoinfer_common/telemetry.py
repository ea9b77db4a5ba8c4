"""Tracing: set-up, the running RPC's span and ids, and spans built afterwards from timestamps.

Tracing is on only where `OTEL_EXPORTER_OTLP_ENDPOINT` is set. Export never delays a request: spans
queue up to a bound, and what does not fit or cannot be delivered is dropped and counted.
"""

import functools
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from importlib import metadata
from typing import Any, Final, NamedTuple

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.util.types import AttributeValue
from prometheus_client import Counter

from nanoinfer_common.errors import StartError

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
MAX_QUEUED_SPANS: Final = 2048
EXPORT_INTERVAL_MILLISECONDS: Final = 500
FLUSH_SECONDS: Final = 2.0

_server_span: ContextVar[trace.Span] = ContextVar(
    "nanoinfer_server_span", default=trace.INVALID_SPAN
)
_request_id: ContextVar[str] = ContextVar("nanoinfer_request_id", default="")


class SpanEvent(NamedTuple):
    """Marks a moment in a span; `time` is in wall-clock nanoseconds."""

    name: str
    time: int
    attributes: Mapping[str, AttributeValue] = {}


# One per process, like the tracer provider whose losses it counts; each server registers it.
DROPPED_SPANS: Final = Counter(
    "nanoinfer_trace_spans_dropped",
    "Spans lost: the queue was full or the export failed.",
    registry=None,
)


class BoundedSpanProcessor(BatchSpanProcessor):
    """Exports in batches from a thread of its own and drops what exceeds `max_queued` spans."""

    def __init__(
        self, exporter: SpanExporter, dropped: Counter, max_queued: int = MAX_QUEUED_SPANS
    ) -> None:
        self._dropped = dropped
        self._places = threading.Semaphore(max_queued)
        super().__init__(
            _CountingExporter(exporter, dropped, self._places),
            # Never reached, because `on_end` stops before it; so every drop is counted here.
            max_queue_size=2 * max_queued,
            max_export_batch_size=min(512, max_queued),
            schedule_delay_millis=_export_interval(),
        )

    def on_end(self, span: ReadableSpan) -> None:
        """Queues a finished span, or drops it. Never blocks."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self._places.acquire(blocking=False):
            super().on_end(span)
        else:
            self._dropped.inc()


class _CountingExporter(SpanExporter):
    def __init__(
        self, exporter: SpanExporter, dropped: Counter, places: threading.Semaphore
    ) -> None:
        self._exporter = exporter
        self._dropped = dropped
        self._places = places

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._places.release(len(spans))
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._dropped.inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _export_interval() -> float:
    """`OTEL_BSP_SCHEDULE_DELAY` in milliseconds, where it is set; StartError if it is no number."""
    text = os.environ.get("OTEL_BSP_SCHEDULE_DELAY", "")
    try:
        return float(text or EXPORT_INTERVAL_MILLISECONDS)
    except ValueError as error:
        raise StartError(f"OTEL_BSP_SCHEDULE_DELAY: {text!r} is no number") from error


def configure_tracing(service_name: str, *, use_proxy: bool = False) -> Callable[[], None]:
    """Sets up tracing where the OTLP endpoint is set; returns the flush-and-stop, at most 2 s.

    `use_proxy` heeds the environment's proxy on the way to the collector, which is usually near.
    Sampler, exporter and further resource attributes follow the `OTEL_*` variables. StartError
    where `OTEL_EXPORTER_OTLP_PROTOCOL` asks for anything but grpc.
    """
    endpoint = next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), "")
    if not endpoint:
        return lambda: None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    if protocol != "grpc":
        raise StartError(f"OTEL_EXPORTER_OTLP_PROTOCOL: only grpc is supported (got {protocol!r})")
    attributes = {"service.name": service_name, "service.version": product_version()}
    attributes["service.instance.id"] = str(uuid.uuid4())
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    options: Any = (("grpc.enable_http_proxy", int(use_proxy)),)  # typed as pairs of strings
    exporter = OTLPSpanExporter(channel_options=options)
    provider.add_span_processor(BoundedSpanProcessor(exporter, DROPPED_SPANS))
    trace.set_tracer_provider(provider)
    structlog.get_logger(__name__).info("tracing", endpoint=endpoint)

    def flush() -> None:
        # In a thread, because an exporter that cannot reach its collector would hold us longer.
        stopper = threading.Thread(target=provider.shutdown, daemon=True)
        stopper.start()
        stopper.join(FLUSH_SECONDS)

    return flush


@functools.cache
def product_version() -> str:
    """Returns the installed distribution's version, read from disk once; `unknown` without one."""
    try:
        return metadata.version("nanoinfer")
    except metadata.PackageNotFoundError:  # run from a folder of sources
        return "unknown"


def tracer() -> trace.Tracer:
    """Returns the tracer of this product."""
    return trace.get_tracer("nanoinfer", product_version(), schema_url=SCHEMA_URL)


def record_span(
    name: str,
    start: int,
    end: int,
    *,
    attributes: Mapping[str, AttributeValue],
    events: Iterable[SpanEvent] = (),
    parent: trace.SpanContext | None = None,
) -> None:
    """Records a span that is over; times are wall-clock nanoseconds (`time.time_ns`).

    Its parent is `parent`, or else the current span. Without either it starts a trace.
    """
    context = None
    if parent is not None:
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
    span = tracer().start_span(name, context, attributes=attributes, start_time=start)
    for event in events:
        span.add_event(event.name, event.attributes, event.time)
    span.end(end)


def set_attributes(attributes: Mapping[str, AttributeValue]) -> None:
    """Sets attributes on the server span of the running RPC, whatever span is current."""
    _server_span.get().set_attributes(dict(attributes))


def server_span() -> trace.Span:
    """Returns the server span of the running RPC; an invalid span outside of one."""
    return _server_span.get()


def request_id() -> str:
    """Returns the running RPC's request id; empty outside of one."""
    return _request_id.get()


def set_request_id(value: str) -> None:
    """Labels the running RPC: its span, its log entries and its trailing metadata."""
    if _request_id.get():
        _label(value)


def enter_rpc(span: trace.Span, label: str) -> None:
    """Makes `span` the server span of this task. Called once by the server interceptor."""
    _server_span.set(span)
    _label(label)


def add_to_log_line(**values: str | int) -> None:
    """Adds counts and labels to the line that the log gets at the RPC's end; never text."""
    structlog.contextvars.bind_contextvars(**values)


def _label(value: str) -> None:
    _request_id.set(value)
    structlog.contextvars.bind_contextvars(request_id=value)
    set_attributes({"nanoinfer.request.id": value})
