"""One call from its caller's side: what travels beside the request, and its span."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry import trace

from nanoinfer.errors import NanoInferError, from_status, trace_id
from nanoinfer.options import Metadata
from nanoinfer.results import Completion


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
