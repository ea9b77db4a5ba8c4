"""One call from its caller's side: the channel it uses, what travels beside the request, its span.

The span is a CLIENT span of opentelemetry-api, a no-op without an SDK; its W3C context goes into
the metadata. Baggage never leaves.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanoinfer.errors import NanoInferError, from_status, trace_id
from nanoinfer.options import CallOptions, Metadata
from nanoinfer.results import Completion

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 300.0
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
SERVICE = "nanoinfer.v1.GatewayService"

RETRY_POLICY = {
    "maxAttempts": 3,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def package_version() -> str:
    """The installed version; `unknown` where the package runs from a bare folder."""
    try:
        return version("nanoinfer")
    except PackageNotFoundError:
        return "unknown"


def channel_options(wait_for_ready: bool, max_message_bytes: int) -> list[tuple[str, str | int]]:
    """Retries, balancing, keepalive and sizes, as the contract sets them for the gateway."""
    service_config = {
        "methodConfig": [
            {
                "name": [{"service": SERVICE}],
                "waitForReady": wait_for_ready,
                "retryPolicy": RETRY_POLICY,
            }
        ],
        "loadBalancingConfig": [{"round_robin": {}}],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
        "healthCheckConfig": {"serviceName": ""},
    }
    return [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.primary_user_agent", f"nanoinfer-python/{package_version()}"),
    ]


def _check(metadata: Mapping[str, str | bytes]) -> None:
    """Raises ValueError for what gRPC would refuse, late and without a name."""
    for key, value in metadata.items():
        if not re.fullmatch(r"[a-z0-9_.-]+", key):
            raise ValueError(f"metadata key {key!r}: lower-case letters, digits, _ . - only")
        text = isinstance(value, str) and value.isascii() and value.isprintable()
        if not (isinstance(value, bytes) if key.endswith("-bin") else text):
            raise ValueError(f"metadata {key!r}: printable ASCII only, or bytes for a -bin key")


class Caller:
    """What the calls of one client share."""

    def __init__(
        self,
        target: str,
        timeout: float | None,
        metadata: Mapping[str, str | bytes] | None,
        tracer_provider: trace.TracerProvider | None,
    ) -> None:
        self._timeout = timeout
        self._metadata = dict(metadata or {})
        self._tracer = trace.get_tracer("nanoinfer", package_version(), tracer_provider)
        self._attributes: dict[str, str | int] = {"rpc.system.name": "grpc"}
        host, _, port = target.rpartition("/")[2].rpartition(":")
        if port.isdecimal():
            self._attributes |= {"server.address": host.strip("[]"), "server.port": int(port)}

    def open(self, method: str, options: CallOptions) -> "Call":
        """Starts a call's span and puts its metadata together."""
        request_id = options.get("request_id") or str(uuid.uuid4())
        headers: dict[str, str | bytes] = {**self._metadata, **(options.get("metadata") or {})}
        headers["x-request-id"] = request_id
        if (priority := options.get("priority")) is not None:
            headers["x-nanoinfer-priority"] = str(priority)
        if (tenant := options.get("tenant")) is not None:
            headers["x-nanoinfer-tenant"] = tenant
        _check(headers)
        name = f"{SERVICE}/{method}"
        span = self._tracer.start_span(
            name,
            kind=trace.SpanKind.CLIENT,
            attributes={**self._attributes, "rpc.method": name},
        )
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
        metadata = (*headers.items(), *carrier.items())
        timeout = options.get("timeout")
        return Call(self._timeout if timeout is None else timeout, metadata, request_id, span)


@dataclass(frozen=True)
class Call:
    """One RPC under way. Exactly one of `succeed`, `fail` and `cancel` ends its span."""

    timeout: float | None
    metadata: Metadata
    request_id: str
    span: trace.Span

    def invoke(self, method: Callable[..., Any], request: object) -> Any:
        """Sends the request; a closed channel raises ValueError."""
        try:
            return method(request, timeout=self.timeout, metadata=self.metadata)
        except BaseException:
            self.cancel()
            raise

    def succeed(self, trailing_metadata: Iterable[Any] | None) -> str | None:
        """Ends the span as OK and returns the server's trace id, where it named one."""
        self._end(grpc.StatusCode.OK, None)
        return trace_id(trailing_metadata or ())

    def fail(
        self,
        code: grpc.StatusCode,
        message: str | None,
        trailing_metadata: Iterable[Any] | None,
        partial: Completion | None = None,
    ) -> NanoInferError:
        """Ends the span with the status and returns the exception to raise."""
        error = from_status(code, message or "", trailing_metadata or (), self.request_id, partial)
        self._end(code, error.reason)
        return error

    def cancel(self) -> None:
        """Ends the span of a call that its own caller gave up."""
        self._end(grpc.StatusCode.CANCELLED, None)

    def _end(self, code: grpc.StatusCode, reason: str | None) -> None:
        self.span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            self.span.set_attribute("error.type", reason or code.name)
            self.span.set_status(trace.StatusCode.ERROR)
        self.span.end()
