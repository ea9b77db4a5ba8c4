"""Channels to the services, set up as the contract says.

No retries but gRPC's transparent ones: callers pick another replica themselves. Tracing: a CLIENT
span for each call and `traceparent` in its metadata;
calls of health, reflection and `Watch…` RPCs make no spans. Baggage does not leave. No proxy of
the environment is used.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias, cast

import grpc
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanoinfer_common import telemetry
from nanoinfer_common.spans import end_span, has_span, rpc_attributes

# grpc-stubs types interceptors only in part, and says so.
Call: TypeAlias = Any
Continuation: TypeAlias = Any
Details: TypeAlias = Any

MAX_RECEIVE_BYTES: Final = 8 * 1024 * 1024
KEEPALIVE_MILLISECONDS: Final = 60_000
KEEPALIVE_TIMEOUT_MILLISECONDS: Final = 20_000
TOKENIZER_UNARY_SECONDS: Final = 5.0
# gRPC would send even loopback addresses through an `http_proxy`, `https_proxy` or `grpc_proxy`.
DIRECT: Final = (("grpc.enable_http_proxy", 0),)

_TOKENIZER: Final = "nanoinfer.v1.TokenizerService"


def open_channel(address: str, more_options: Iterable[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """Opens a plaintext aio channel; the caller closes it."""
    options = [
        *DIRECT,
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", -1),
        # What nobody reads stays with its sender: gRPC would widen a stream's window to megabytes.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
        # The one that ends the connection: without it an unanswered ping is waited for for 60 s.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
        ("grpc.keepalive_permit_without_calls", 0),
        # A service that restarted is found again within a second, one that is gone is not hammered.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 5000),
        *more_options,
    ]
    kinds = (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
    interceptors = [cast(grpc.aio.ClientInterceptor, kind(address)) for kind in kinds]
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)


class _Tracing:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host = host.rpartition("/")[2] or address
        self._port = int(port) if port.isdigit() else 0

    async def trace(self, continuation: Continuation, details: Details, request: Any) -> Call:
        method = _method(details)
        if not has_span(method):
            return await continuation(details, request)
        attributes = rpc_attributes(method, self._host, self._port)
        span = telemetry.tracer().start_span(
            method, kind=trace.SpanKind.CLIENT, attributes=attributes
        )
        try:
            call = await continuation(_with_context(details, span), request)
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(trace.StatusCode.ERROR)
            span.end()
            raise
        call.add_done_callback(lambda done: _end(span, done))
        return call


# gRPC takes an interceptor for the first kind of call that it declares, so each kind has its class.
class _UnaryUnary(_Tracing, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(
        self, continuation: Continuation, client_call_details: Details, request: Any
    ) -> Call:
        return await self.trace(continuation, _bounded(client_call_details), request)


class _UnaryStream(_Tracing, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    intercept_unary_stream: Any = _Tracing.trace


class _StreamUnary(_Tracing, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    intercept_stream_unary: Any = _Tracing.trace


class _StreamStream(_Tracing, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    intercept_stream_stream: Any = _Tracing.trace


def _bounded(details: Details) -> Details:
    """Bounds tokenizer calls to 5 s.

    Not by the service config's `timeout`, which ends calls up to 2 s too early (grpc#34547,
    grpc#40633: "2s" fired after 0.24 s) and which servers do not get to see.
    """
    if not _method(details).startswith(f"{_TOKENIZER}/"):
        return details
    given = TOKENIZER_UNARY_SECONDS if details.timeout is None else details.timeout
    return details._replace(timeout=min(given, TOKENIZER_UNARY_SECONDS))


def _method(details: Details) -> str:
    method = details.method
    return (method.decode() if isinstance(method, bytes) else str(method)).removeprefix("/")


def _with_context(details: Details, span: trace.Span) -> Details:
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
    given = cast(Sequence[tuple[str, str | bytes]], details.metadata or ())
    kept = [(key, value) for key, value in given if key not in {"baggage", *carrier}]
    return details._replace(metadata=grpc.aio.Metadata(*kept, *carrier.items()))


def _end(span: trace.Span, call: Call) -> None:
    # A finished call's code is known: its coroutine returns at the first step, so a done callback,
    # which cannot await, may run it by hand.
    code = grpc.StatusCode.UNKNOWN
    try:
        call.code().send(None)
    except StopIteration as done:
        code = done.value
    end_span(span, code, is_error=code is not grpc.StatusCode.OK)
