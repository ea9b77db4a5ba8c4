"""Client-side tracing of aio channels: a CLIENT span for each call and `traceparent` in metadata.

Calls of health, reflection and `Watch…` RPCs make no spans. Baggage does not leave.
"""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias, cast

import grpc
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanoinfer_common import telemetry
from nanoinfer_common.spans import end_client_span, has_span

# grpc-stubs types interceptors only in part, and says so.
Call: TypeAlias = Any
Continuation: TypeAlias = Any

_PROPAGATOR: Final = TraceContextTextMapPropagator()


def client_interceptors(address: str = "") -> list[grpc.aio.ClientInterceptor]:
    """Returns the interceptors of an aio channel to `address`."""
    kinds = (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
    return [cast(grpc.aio.ClientInterceptor, kind(address)) for kind in kinds]


class _Tracing:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._attributes: dict[str, str | int] = {"rpc.system.name": "grpc"}
        self._attributes["server.address"] = host.rpartition("/")[2] or address
        if port.isdigit():
            self._attributes["server.port"] = int(port)

    async def _traced(self, continuation: Continuation, details: Any, request: Any) -> Call:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        method = method.removeprefix("/")
        if not has_span(method):
            return await continuation(details, request)
        attributes = {**self._attributes, "rpc.method": method}
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
        call.add_done_callback(lambda done: end_client_span(span, _code(done)))
        return call


class _UnaryUnary(_Tracing, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(
        self, continuation: Continuation, client_call_details: Any, request: Any
    ) -> Call:
        return await self._traced(continuation, client_call_details, request)


class _UnaryStream(_Tracing, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_stream(
        self, continuation: Continuation, client_call_details: Any, request: Any
    ) -> Call:
        return await self._traced(continuation, client_call_details, request)


class _StreamUnary(_Tracing, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_stream_unary(
        self, continuation: Continuation, client_call_details: Any, request_iterator: Any
    ) -> Call:
        return await self._traced(continuation, client_call_details, request_iterator)


class _StreamStream(_Tracing, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_stream_stream(
        self, continuation: Continuation, client_call_details: Any, request_iterator: Any
    ) -> Call:
        return await self._traced(continuation, client_call_details, request_iterator)


def _with_context(details: Any, span: trace.Span) -> grpc.aio.ClientCallDetails:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    given = cast(Sequence[tuple[str, str | bytes]], details.metadata or ())
    replaced = {"baggage", *carrier}
    kept = [(key, value) for key, value in given if key not in replaced]
    return grpc.aio.ClientCallDetails(
        details.method,
        details.timeout,
        grpc.aio.Metadata(*kept, *carrier.items()),
        details.credentials,
        details.wait_for_ready,
    )


def _code(call: Call) -> grpc.StatusCode:
    # A finished call's code is known: its coroutine returns at the first step, so a done callback,
    # which cannot await, may run it by hand.
    coroutine = call.code()
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast(grpc.StatusCode, done.value)
    coroutine.close()
    return grpc.StatusCode.UNKNOWN
