"""An OTLP receiver in this process: keeps the newest traces in memory and gives them out by id.

Beside the standard TraceService it has one method of its own, `TRACE`: a trace id (BytesValue) in,
an ExportTraceServiceRequest with that trace's spans out.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf.wrappers_pb2 import BytesValue
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from nanoinfer.health import proxy_options

MAX_TRACES = 256
MAX_SPANS_PER_TRACE = 4096
SERVICE = "nanoinfer.cli.Collector"
TRACE = f"/{SERVICE}/GetTrace"
_MESSAGE_SIZE = ("grpc.max_receive_message_length", 16 * 1024 * 1024)

ExportRequest = trace_service_pb2.ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A finished span; times in nanoseconds since the epoch, `events` by time."""

    service: str
    name: str
    kind: str
    span_id: bytes
    parent_id: bytes
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: tuple[tuple[int, str], ...] = ()
    failed: bool = False


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives spans at `address` while the `with` block runs. Thread-safe; bounded memory."""

    def __init__(self, port: int = 0) -> None:
        self._lock = threading.Lock()
        self._traces: OrderedDict[bytes, list[trace_pb2.ResourceSpans]] = OrderedDict()
        options = [_MESSAGE_SIZE, ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4), options=options)
        register: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        register(self, self._server)
        get = grpc.unary_unary_rpc_method_handler(
            self._get, BytesValue.FromString, ExportRequest.SerializeToString
        )
        handler = grpc.method_handlers_generic_handler(SERVICE, {"GetTrace": get})
        self._server.add_generic_rpc_handlers([handler])
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"

    def Export(
        self, request: ExportRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes spans in; what exceeds the bounds is dropped, oldest traces first."""
        with self._lock:
            for resource, span in _spans(request):
                kept = self._traces.setdefault(span.trace_id, [])
                if len(kept) < MAX_SPANS_PER_TRACE:
                    scope = trace_pb2.ScopeSpans(spans=[span])
                    kept.append(trace_pb2.ResourceSpans(resource=resource, scope_spans=[scope]))
                if len(self._traces) > MAX_TRACES:
                    self._traces.popitem(last=False)
        return trace_service_pb2.ExportTraceServiceResponse()

    def _get(self, request: BytesValue, context: Any) -> ExportRequest:
        with self._lock:
            return ExportRequest(resource_spans=self._traces.get(request.value, ()))

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


def fetch(
    address: str, trace_id: str, timeout: float = 5.0, *, use_proxy: bool = False
) -> list[Span]:
    """A trace's spans so far. Raises grpc.RpcError where no collector answers at `address`."""
    options = [_MESSAGE_SIZE, *proxy_options(use_proxy)]
    with grpc.insecure_channel(address, options) as channel:
        get = channel.unary_unary(TRACE, BytesValue.SerializeToString, ExportRequest.FromString)
        found = get(BytesValue(value=bytes.fromhex(trace_id)), timeout=timeout)
    return [_decode(resource, span) for resource, span in _spans(found)]


def _spans(request: ExportRequest) -> Iterator[tuple[Resource, trace_pb2.Span]]:
    for group in request.resource_spans:
        for scope in group.scope_spans:
            for span in scope.spans:
                yield group.resource, span


def _decode(resource: Resource, span: trace_pb2.Span) -> Span:
    return Span(
        service=str(_values(resource.attributes).get("service.name", "unknown")),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        span_id=span.span_id,
        parent_id=span.parent_span_id,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        events=tuple((event.time_unix_nano, event.name) for event in span.events),
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
    )


def _values(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(entry) for entry in value.array_value.values]
    return None if kind is None else getattr(value, kind)
