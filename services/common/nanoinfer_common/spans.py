"""RPC spans by OpenTelemetry's RPC conventions, and whom to trust for their parent."""

from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import unquote

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanoinfer_common import telemetry
from nanoinfer_common.config import ServiceSettings

MAX_TRACESTATE_CHARS: Final = 1024
# Codes that are the server's fault; the others leave a server span's status unset.
SERVER_FAULTS: Final = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)


def is_watch(method: str) -> bool:
    """Says whether `method` streams a state without an end of its own, such as `WatchLoad`."""
    return method.rpartition("/")[2].startswith("Watch")


def has_span(method: str) -> bool:
    """Says whether calls of `method` (`nanoinfer.v1.EngineService/Generate`) are traced."""
    return not method.startswith("grpc.") and not is_watch(method)


def incoming_trace(metadata: Iterable[tuple[str, Any]]) -> trace.SpanContext | None:
    """Reads a caller's W3C trace context; None where there is none or it is garbage."""
    given = list(metadata)
    parents = [value for key, value in given if key == "traceparent"]
    states = [value for key, value in given if key == "tracestate"]
    if len(parents) != 1 or sum(len(state) for state in states) > MAX_TRACESTATE_CHARS:
        return None
    carrier = {"traceparent": parents[0], "tracestate": ",".join(states)}
    context = TraceContextTextMapPropagator().extract(carrier, otel_context.Context())
    span_context = trace.get_current_span(context).get_span_context()
    return span_context if span_context.is_valid else None


def rpc_attributes(method: str, host: str, port: int) -> dict[str, str | int]:
    """Returns the attributes of an RPC's span, on either side; a port of 0 is not known."""
    attributes: dict[str, str | int] = {"rpc.system.name": "grpc", "rpc.method": method}
    attributes["server.address"] = host
    return attributes | ({"server.port": port} if port else {})


def start_server_span(
    method: str, metadata: Iterable[tuple[str, Any]], peer: str, settings: ServiceSettings
) -> trace.Span:
    """Starts the span of an RPC that arrived from `peer` (gRPC's form, `ipv4:127.0.0.1:5000`).

    The caller's trace is continued where the settings trust it; otherwise it becomes a link.
    """
    incoming = incoming_trace(metadata)
    parent = otel_context.Context()
    links = []
    if incoming is not None and settings.trust_incoming_trace:
        parent = trace.set_span_in_context(trace.NonRecordingSpan(incoming), parent)
    elif incoming is not None:
        links = [trace.Link(incoming)]
    attributes = rpc_attributes(method, settings.host, settings.port) | _peer(peer)
    return telemetry.tracer().start_span(method, parent, trace.SpanKind.SERVER, attributes, links)


def record_unknown_method(method: str) -> None:
    """Records a call of a method that does not exist, without letting callers invent names."""
    attributes = {"rpc.system.name": "grpc", "rpc.method": "_OTHER"}
    attributes["rpc.method_original"] = method[:128]
    span = telemetry.tracer().start_span(
        "_OTHER", otel_context.Context(), trace.SpanKind.SERVER, attributes
    )
    end_span(span, grpc.StatusCode.UNIMPLEMENTED, is_error=True)


def end_span(span: trace.Span, code: grpc.StatusCode, *, is_error: bool) -> None:
    """Ends an RPC's span with the code; its status is ERROR, or else unset."""
    span.set_attribute("rpc.response.status_code", code.name)
    if code is not grpc.StatusCode.OK:
        span.set_attribute("error.type", code.name)
    if is_error:
        span.set_status(trace.StatusCode.ERROR)
    span.end()


def _peer(peer: str) -> dict[str, str | int]:
    family, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdigit():
        return {}
    return {"network.peer.address": host.strip("[]"), "network.peer.port": int(port)}
