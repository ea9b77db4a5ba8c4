"""Around every RPC: span, request id, deadline, refusal while loading or draining, error mapping.

A handler answers by returning, or fails by raising: `ServiceError` becomes its rich status, and
anything else, BaseException included, an opaque INTERNAL whose details go to the log. Health and
reflection pass untouched. `Watch…` RPCs stream a state and have no end of their own: they make no
spans, get no deadline from the server, and a drain does not wait for them.
"""

import asyncio
import contextlib
import inspect
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, cast

import grpc
import structlog
from nanoinfer.v1 import generation_pb2 as pb
from opentelemetry import context as otel_context
from opentelemetry import trace
from prometheus_client import Counter

from nanoinfer_common import errors, names, telemetry
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.field_checks import MAX_REQUEST_ID_CHARS, is_label
from nanoinfer_common.metrics import bounded_label
from nanoinfer_common.receiving import Inbox, parse, parsed
from nanoinfer_common.sending import CallContext, Outbox
from nanoinfer_common.spans import (
    SERVER_FAULTS,
    end_span,
    has_span,
    is_watch,
    record_unknown_method,
    start_server_span,
)
from nanoinfer_common.status import ServiceStatus

# grpc-stubs types handlers and interceptors only in part, and says so.
Handler: TypeAlias = Any
Context: TypeAlias = Any

# A client's own deadline reaches the server as a cancel; one this close to it was the deadline.
DEADLINE_SLACK_SECONDS: Final = 0.05
REFUSAL_RETRY_SECONDS: Final = 1.0
_REFUSALS: Final = {
    pb.SERVER_STATE_LOADING: (names.LOADING, "loading"),
    pb.SERVER_STATE_DRAINING: (names.SHUTTING_DOWN, "shutting down"),
}
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

log = structlog.get_logger(__name__)


class RpcInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of a server whose errors carry `domain`; knows the calls that run.

    Requests are refused with UNAVAILABLE while the status is LOADING or DRAINING. Refusals wait
    for `may_refuse`: a drain sends clients away from their connections first, because a client that
    heard sooner would repeat its call on the connection that refused it.
    """

    def __init__(self, domain: str, settings: ServiceSettings, status: ServiceStatus) -> None:
        self.domain = domain
        self.settings = settings
        self.status = status
        self.inbox = Inbox(settings.max_received_bytes, settings.max_message_bytes)
        self.outbox = Outbox(settings.max_unsent_bytes)
        self.finished = Counter(
            "nanoinfer_rpcs",
            "RPCs that ended, by method, code and error reason; those of `Watch...` too.",
            ("method", "code", "reason"),
            registry=None,
        )
        self.may_refuse = asyncio.Event()
        self.may_refuse.set()
        self.running: set[RunningCall] = set()
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        """Finds the handler and wraps it once per method."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.removeprefix("/")
        if method.startswith("grpc."):
            return handler
        if handler is None:
            record_unknown_method(method)
            return grpc.stream_stream_rpc_method_handler(self._refuse_unknown)
        if method not in self._wrapped:
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def num_requests(self) -> int:
        """Number of calls running, those that have no end of their own left out."""
        return sum(not is_watch(call.method) for call in self.running)

    def interrupt_all(self, error: ServiceError) -> None:
        """Ends every running call with `error`."""
        for call in self.running:
            call.interrupt(error)

    async def _refuse_unknown(self, messages: Any, context: Context) -> None:
        """Answers a call of a method that does not exist, without counting it by its name."""
        message = "this service has no such method"
        error = ServiceError(grpc.StatusCode.UNIMPLEMENTED, names.UNKNOWN_METHOD, message)
        status = errors.to_status(error, self.domain)
        request_id = _request_id(list(context.invocation_metadata() or ()))
        details = (names.STATUS_DETAILS, status.SerializeToString())
        await context.abort(error.code, message, ((names.REQUEST_ID, request_id), details))

    def _wrap(self, method: str, handler: Handler) -> Handler:
        """Makes a handler that reads, parses and writes messages itself.

        To gRPC it takes and gives streams of bytes, so that no message is read before the call is
        known here, and none is written that is not. On the wire that is the same.
        """

        async def respond(messages: Any, context: Context) -> None:
            await RunningCall(self, method, handler, context).respond(messages)

        return grpc.stream_stream_rpc_method_handler(respond)


class RunningCall:
    """One RPC from its first to its last moment."""

    def __init__(
        self, interceptor: RpcInterceptor, method: str, handler: Handler, context: Context
    ) -> None:
        """`handler` is what the service registered."""
        self.method = method
        self._interceptor = interceptor
        self._handler = handler
        self._context = CallContext(context, handler.response_serializer, interceptor.outbox)
        self._started = time.perf_counter()
        self._task = cast(asyncio.Task[Any], asyncio.current_task())
        self._interruption: ServiceError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._span: trace.Span = trace.INVALID_SPAN

    async def respond(self, messages: AsyncIterator[bytes]) -> None:
        """Answers as the handler does, or with the status of what it raised."""
        try:
            await self._respond(messages)
        finally:
            self._context.close()

    async def _respond(self, messages: AsyncIterator[bytes]) -> None:
        self._enter()
        try:
            self._start_deadline()
            if self._handler.request_streaming:
                await self._admit()
                await self._handle(parsed(messages, self._handler.request_deserializer))
            else:
                await self._handle_one()
        except BaseException as raised:
            ending = self._ending(raised)
            _clear_frames(raised)
            if isinstance(ending, grpc.StatusCode):
                self._finish(ending)
            else:
                await self._abort(ending)
            raise
        self._context.set_trailing_metadata((*self._context.trailing_metadata(), *self._ids()))
        self._finish(_as_code(self._context.code()))

    def interrupt(self, error: ServiceError) -> None:
        """Cancels the handler and answers with `error`."""
        if self._interruption is None:
            self._interruption = error
            self._task.cancel()

    def _enter(self) -> None:
        metadata = list(self._context.invocation_metadata() or ())
        self._interceptor.running.add(self)
        if has_span(self.method):
            self._span = start_server_span(
                self.method, metadata, self._context.peer(), self._interceptor.settings
            )
        # The task is this call's own, so nothing has to be detached or reset at its end.
        otel_context.attach(trace.set_span_in_context(self._span))
        telemetry.enter_rpc(self._span, _request_id(metadata))

    async def _admit(self) -> None:
        """Refuses the call while the service loads or drains, or has sent too much unread."""
        if self.method.endswith("/GetServerInfo"):
            return
        state = self._interceptor.status.state
        if state in _REFUSALS:
            await self._interceptor.may_refuse.wait()
            raise errors.unavailable(*_REFUSALS[state], REFUSAL_RETRY_SECONDS)
        refusal = self._interceptor.outbox.refusal()
        if refusal is not None and not is_watch(self.method):
            raise refusal

    def _start_deadline(self) -> None:
        settings = self._interceptor.settings
        given = self._context.time_remaining()
        limit = settings.default_deadline_seconds if given is None else given
        limit = min(limit, settings.max_deadline_seconds)
        if limit != given and not is_watch(self.method):
            error = ServiceError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                names.DEADLINE_EXCEEDED,
                f"the server's deadline of {limit:g} s has passed",
            )
            self._timer = asyncio.get_running_loop().call_later(limit, self.interrupt, error)

    async def _handle_one(self) -> None:
        inbox = self._interceptor.inbox
        raw = await inbox.read(self._context)
        with inbox.held(len(raw)):
            request = parse(raw, self._handler.request_deserializer)
            del raw  # parsed, it would only double what the call holds
            _label(request)
            await self._admit()
            await self._handle(request)

    async def _handle(self, request: Any) -> None:
        request_kind = "stream" if self._handler.request_streaming else "unary"
        response_kind = "stream" if self._handler.response_streaming else "unary"
        result = getattr(self._handler, f"{request_kind}_{response_kind}")(request, self._context)
        if not inspect.isasyncgen(result):
            response = await result
            if not self._handler.response_streaming:
                await self._context.write(response)
            return
        # Messages are written here rather than yielded, so that a cancel during a write
        # lands in this frame and closes the handler's generator at once.
        async with contextlib.aclosing(result) as messages:
            async for message in messages:
                await self._context.write(message)

    def _ending(self, raised: BaseException) -> ServiceError | grpc.StatusCode:
        """Returns what to answer, or the code where that is done or nobody waits for it."""
        if isinstance(raised, grpc.aio.AbortError):
            return _as_code(self._context.code())
        if isinstance(raised, GeneratorExit | KeyboardInterrupt | SystemExit):
            return grpc.StatusCode.CANCELLED
        if self._interruption is not None:
            self._task.uncancel()
            return self._interruption
        # Writing to a client that is gone fails with gRPC's InternalError. A CancelledError without
        # a cancel of this task came from something that the handler awaited: a bug, to be answered.
        cancelled = isinstance(raised, asyncio.CancelledError) and self._task.cancelling() > 0
        if cancelled or isinstance(raised, grpc.aio.InternalError):
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= DEADLINE_SLACK_SECONDS
            return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        if isinstance(raised, ServiceError):
            return raised
        log.error("unexpected", method=self.method, exc_info=raised)
        self._span.record_exception(raised)
        return errors.internal()

    async def _abort(self, error: ServiceError) -> None:
        status = errors.to_status(error, self._interceptor.domain, telemetry.request_id())
        trailing = [*self._ids(), (names.STATUS_DETAILS, status.SerializeToString())]
        if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after is not None:
            trailing.append((names.RETRY_PUSHBACK, str(int(error.retry_after * 1000))))
        self._finish(error.code, error.reason)
        await self._context.opened()
        await self._context.abort(error.code, status.message, tuple(trailing))

    def _ids(self) -> list[tuple[str, str | bytes]]:
        ids: list[tuple[str, str | bytes]] = [(names.REQUEST_ID, telemetry.request_id())]
        context = self._span.get_span_context()
        if context.is_valid:
            ids.append((names.TRACE_ID, trace.format_trace_id(context.trace_id)))
        return ids

    def _finish(self, code: grpc.StatusCode, reason: str = "") -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._interceptor.running.discard(self)
        told = {"reason": reason} if reason else {}
        if reason:
            self._span.set_attribute("nanoinfer.error.reason", reason)
        # A reason is a constant of ours, or of the service behind us, whose reasons are ours too.
        counted = bounded_label(reason, names.REASONS) if reason else ""
        self._interceptor.finished.labels(self.method, code.name, counted).inc()
        end_span(self._span, code, is_error=code.name in SERVER_FAULTS)
        seconds = round(time.perf_counter() - self._started, 6)
        log.info("rpc", method=self.method, code=code.name, duration_seconds=seconds, **told)


def _clear_frames(error: BaseException | None) -> None:
    """Lets go of what the frames hold that an error came through.

    The request is among it: 2 MiB may be 60 MB once parsed, and a status may be taken late.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _request_id(metadata: Sequence[tuple[str, Any]]) -> str:
    """Returns the id that a call's metadata give it, or a new one."""
    given = [value for key, value in metadata if key == names.REQUEST_ID]
    usable = len(given) == 1 and is_label(given[0], MAX_REQUEST_ID_CHARS)
    return str(given[0]) if usable else str(uuid.uuid4())


def _label(request: Any) -> None:
    """Labels the call with the id that its request brings, before anything can refuse it."""
    options = getattr(request, "options", request)
    given = getattr(options, "request_id", None)
    if isinstance(given, str) and is_label(given, MAX_REQUEST_ID_CHARS):
        telemetry.set_request_id(given)


def _as_code(code: object) -> grpc.StatusCode:
    # aio gives None until a code is set, and the bare number where one was set as a number.
    if isinstance(code, int):
        return _CODES.get(code, grpc.StatusCode.UNKNOWN)
    return cast(grpc.StatusCode, code) if code else grpc.StatusCode.OK
