"""One call from its caller's side: what travels beside the request, its span, and how it ends."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic

import grpc
from opentelemetry import trace

from nanoinfer.errors import NanoInferError, from_status
from nanoinfer.queries import Query, Result

Metadata = tuple[tuple[str, str | bytes], ...]
_CLOSED = grpc.aio.AioRpcError(
    grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), "client closed", None
)


@dataclass
class Call(Generic[Result]):
    """An RPC; `rpc` is gRPC's own object once it is under way. The first end ends the span."""

    query: Query[Result]
    timeout: float | None
    metadata: Metadata
    request_id: str
    span: trace.Span
    trace_id: str | None = None
    rpc: Any = field(init=False)

    def start(self, method: Callable[..., Any]) -> None:
        """Sends the request; a closed channel raises ValueError."""
        try:
            self.rpc = method(self.query.request, timeout=self.timeout, metadata=self.metadata)
        except BaseException:
            self._end(grpc.StatusCode.CANCELLED, None)
            raise

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
            raise self._failed(_CLOSED, partial()) from None
        except grpc.FutureCancelledError:
            raise self._failed(_CLOSED, partial()) from None
        except grpc.RpcError as error:
            raise self._failed(error, partial()) from None
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
        self.rpc.cancel()
        self._end(grpc.StatusCode.CANCELLED, None)

    def _failed(self, status: Any, partial: Any) -> NanoInferError:
        error = from_status(status, self.request_id, partial)
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
