"""What both clients are built from: the channel, a call and its span, the defaults of calls.

A call's span is a CLIENT span of opentelemetry-api, a no-op without an SDK; its W3C context goes
into the metadata. Baggage never leaves.
"""

import asyncio
import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Generic

import grpc
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanoinfer import health
from nanoinfer.errors import NanoInferError, from_status
from nanoinfer.queries import Query, Result
from nanoinfer.targets import check_target
from nanoinfer.v1 import gateway_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 300.0
DEFAULT_CONNECT_TIMEOUT = 5.0
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
# Half of them are retries at once: all calls that a leaving gateway refuses on one connection.
MAX_RETRY_TOKENS = 1000
SERVICE = "nanoinfer.v1.GatewayService"
RETRY_POLICY = {
    "maxAttempts": 3,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def _status(code: grpc.StatusCode, message: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), message, None)


_CLOSED = _status(grpc.StatusCode.CANCELLED, "client closed")


def package_version() -> str:
    """The installed version; `unknown` where the package runs from a bare folder."""
    try:
        return version("nanoinfer")
    except PackageNotFoundError:
        return "unknown"


def _channel_options(
    connect_timeout: float, max_message_bytes: int, use_proxy: bool
) -> list[tuple[str, str | int]]:
    """Retries, balancing, keepalive, sizes and proxy, as the contract sets them for the gateway.

    Connecting is tried again every second, so that a gateway that starts late is found in time; an
    attempt gets as long as the caller waits.

    No healthCheckConfig: a gateway without its upstreams says NOT_SERVING, yet answers a request
    with what it lacks (NO_ENGINE); gating by health would make a wait of that answer.
    """
    method_config = {
        "name": [{"service": SERVICE}],
        "retryPolicy": RETRY_POLICY,
    }
    service_config = {
        "methodConfig": [method_config],
        "loadBalancingConfig": [{"round_robin": {}}],
        "retryThrottling": {"maxTokens": MAX_RETRY_TOKENS, "tokenRatio": 0.1},
    }
    return [
        *health.proxy_options(use_proxy),
        ("grpc.service_config", json.dumps(service_config)),
        # Ends the connection; without it an unanswered ping is waited for for 60 s.
        ("grpc.http2.ping_timeout_ms", 20_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.min_reconnect_backoff_ms", max(1000, int(1000 * connect_timeout))),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.primary_user_agent", f"nanoinfer-python/{package_version()}"),
    ]


@dataclass
class Call(Generic[Result]):
    """An RPC; `rpc` is gRPC's own object once it is under way. The first end ends the span."""

    query: Query[Result]
    target: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    request_id: str
    span: trace.Span
    trace_id: str | None = None
    answered: bool = False
    rpc: Any = field(default=None, init=False)
    _abandoned: grpc.aio.AioRpcError | None = field(default=None, init=False)

    def start(
        self, method: Callable[..., Any], wait_for_ready: bool = False, elapsed: float = 0.0
    ) -> None:
        """Sends the request, once connected if `wait_for_ready`; a closed channel: ValueError.

        `elapsed` is what of the timeout is over already.
        """
        timeout = None if self.timeout is None else max(0.0, self.timeout - elapsed)
        try:
            self.rpc = method(
                self.query.request,
                timeout=timeout,
                metadata=self.metadata,
                wait_for_ready=wait_for_ready,
            )
        except BaseException:
            self._end(grpc.StatusCode.CANCELLED, None)
            raise

    def abandon(self, seconds: float, cause: str) -> grpc.aio.AioRpcError:
        """Gives the call up for want of a connection; the status is what its reader gets."""
        late = self.timeout is not None and self.timeout <= seconds
        code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.UNAVAILABLE
        message = f"cannot connect to {self.target} within {seconds:g} s: {cause}"
        self._abandoned = _status(code, message)
        if self.rpc is not None:
            self.rpc.cancel()
        return self._abandoned

    @contextmanager
    def receiving(self, partial: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """Ends the call where the block breaks; what gRPC raises becomes a NanoInferError.

        gRPC reports a call that its client's end cancelled as if this task had been cancelled.
        """
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self.cancel()
                raise
            raise self._failed(self._abandoned or _CLOSED, partial()) from None
        except grpc.FutureCancelledError:
            raise self._failed(self._abandoned or _CLOSED, partial()) from None
        except grpc.RpcError as error:
            raise self._failed(self._abandoned or error, partial()) from None
        except BaseException:  # an interrupt, or the caller's own code
            self.cancel()
            raise

    def succeed(self, trailing_metadata: Any) -> None:
        """Ends the call as OK and keeps the server's trace id, where it named one."""
        self._end(grpc.StatusCode.OK, None)
        self.trace_id = next((v for k, v in trailing_metadata or () if k == "x-trace-id"), None)

    def decode(self, response: Any) -> Result:
        """What the response means."""
        return self.query.decode(response, self.request_id, self.trace_id)

    def cancel(self) -> None:
        """Gives the call up where it is not over."""
        if self.rpc is not None:
            self.rpc.cancel()
        self._end(grpc.StatusCode.CANCELLED, None)

    def _failed(self, status: Any, partial: Any) -> NanoInferError:
        error = from_status(status, self.request_id, partial)
        if error.reason is None and self.target not in error.message:
            if error.code is grpc.StatusCode.UNAVAILABLE:
                error.message = f"{self.target}: {error.message}"
            elif error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                error.message = f"{self.target} did not answer within {self.timeout or 0:g} s"
        self._end(error.code, error.reason)
        return error

    def _end(self, code: grpc.StatusCode, reason: str | None) -> None:
        if not self.span.is_recording():
            return
        self.span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            self.span.set_attribute("error.type", reason or code.name)
            self.span.set_status(trace.StatusCode.ERROR)
        self.span.end()


class ClientBase:
    """Holds a gateway's channel.

    `timeout` in seconds holds for calls that bring none; None means no deadline. A gateway that
    cannot be reached is waited for up to `connect_timeout` seconds of a call, then the call is
    `Unavailable`; without `wait_for_ready` it is so at once. `metadata` is sent with every call.
    The environment's `http_proxy`, `https_proxy` and `grpc_proxy` are heeded with `use_proxy`
    alone: a gateway behind one is rare, and gRPC would send loopback addresses there too.
    """

    _transport: ClassVar[Any]  # grpc or grpc.aio

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        connect_timeout: float = DEFAULT_CONNECT_TIMEOUT,
        wait_for_ready: bool = True,
        metadata: Mapping[str, str | bytes] | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        tracer_provider: trace.TracerProvider | None = None,
        use_proxy: bool = False,
    ) -> None:
        check_target(target)
        if not 0 < connect_timeout < math.inf:
            raise ValueError(f"connect_timeout is a number of seconds, not {connect_timeout!r}")
        self.target = target
        arguments = _channel_options(connect_timeout, max_message_bytes, use_proxy)
        if credentials is None:
            self._channel = self._transport.insecure_channel(target, arguments)
        else:
            self._channel = self._transport.secure_channel(target, credentials, arguments)
        self._stub: Any = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._waits = wait_for_ready
        self._prepare()
        self._metadata = dict(metadata or {})
        self._tracer = trace.get_tracer("nanoinfer", package_version(), tracer_provider)
        self._attributes: dict[str, str | int] = {"rpc.system.name": "grpc"}
        host, _, port = target.rpartition("/")[2].rpartition(":")
        if port.isdecimal():
            self._attributes |= {"server.address": host.strip("[]"), "server.port": int(port)}

    def _prepare(self) -> None:
        """Sets up what a transport needs besides."""

    def _method(self, query: Query[Any]) -> Any:
        return getattr(self._stub, query.method)

    def _patience(self, call: Call[Any]) -> float:
        """Seconds that a call waits for a connection."""
        limits = (self._connect_timeout, call.timeout)
        return min(limit for limit in limits if limit is not None)

    def _call(self, query: Query[Result]) -> Call[Result]:
        """A call that is ready to start; its span has begun."""
        settings = query.settings
        request_id = settings.get("request_id") or str(uuid.uuid4())
        headers: dict[str, str | bytes] = {**self._metadata, **(settings.get("metadata") or {})}
        headers["x-request-id"] = request_id
        if (priority := settings.get("priority")) is not None:
            headers["x-nanoinfer-priority"] = str(priority)
        if (tenant := settings.get("tenant")) is not None:
            headers["x-nanoinfer-tenant"] = tenant
        _check(headers)
        name = f"{SERVICE}/{query.method}"
        attributes = {**self._attributes, "rpc.method": name}
        span = self._tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes)
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
        metadata = (*headers.items(), *carrier.items())
        timeout = settings.get("timeout")
        timeout = self._timeout if timeout is None else timeout
        return Call(query, self.target, timeout, metadata, request_id, span)


def _check(metadata: Mapping[str, str | bytes]) -> None:
    """Raises ValueError for what gRPC would refuse, late and without a name."""
    for key, value in metadata.items():
        if not re.fullmatch(r"[a-z0-9_.-]+", key):
            raise ValueError(f"metadata key {key!r}: lower-case letters, digits, _ . - only")
        text = isinstance(value, str) and value.isascii() and value.isprintable()
        if not (isinstance(value, bytes) if key.endswith("-bin") else text):
            raise ValueError(f"metadata {key!r}: printable ASCII only, or bytes for a -bin key")
