"""What can go wrong, as typed exceptions.

    NanoInferError
    ├ InvalidRequest       INVALID_ARGUMENT, OUT_OF_RANGE     change the request
    ├ NotFound             NOT_FOUND                          no such model
    ├ Unsupported          UNIMPLEMENTED                      the server lacks the feature
    ├ PreconditionFailed   FAILED_PRECONDITION                not in this set-up
    ├ Overloaded           RESOURCE_EXHAUSTED                 wait `retry_after`, then try again
    ├ Unavailable          UNAVAILABLE                        no server, or it is going away
    ├ DeadlineExceeded     DEADLINE_EXCEEDED                  `timeout` passed
    ├ Cancelled            CANCELLED                          somebody cancelled the call
    ├ PermissionDenied     UNAUTHENTICATED, PERMISSION_DENIED
    └ ServerError          everything else                    a fault of the server

The details are those of `google.rpc`: ErrorInfo, BadRequest, RetryInfo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from nanoinfer.results import Completion

STATUS_DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that the server refused."""

    field: str
    description: str


class NanoInferError(Exception):
    """A call that did not succeed.

    `code` is the gRPC status. `reason` is the stable name of the cause, `metadata` its parameters;
    gRPC's own failures have none. `retry_after` is in seconds. `partial` is what a stream had
    delivered before it broke. `request_id` and `trace_id` lead to the server's logs and spans.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
        request_id: str | None = None,
        trace_id: str | None = None,
        partial: Completion | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = violations
        self.retry_after = retry_after
        self.request_id = request_id
        self.trace_id = trace_id
        self.partial = partial

    def __str__(self) -> str:
        label = self.code.name if self.reason is None else f"{self.code.name} ({self.reason})"
        return f"{label}: {self.message}"


class InvalidRequest(NanoInferError):
    """The request breaks a rule; `violations` names the fields."""


class NotFound(NanoInferError):
    """The model does not exist here."""


class Unsupported(NanoInferError):
    """The server does not have the feature that the request asks for."""


class PreconditionFailed(NanoInferError):
    """The server is not set up for it: a feature is switched off, there is no chat template."""


class Overloaded(NanoInferError):
    """The server is full; `retry_after` says when to try again."""


class Unavailable(NanoInferError):
    """Nobody answers, or the server is starting or ending."""


class DeadlineExceeded(NanoInferError):
    """The call took longer than its `timeout`."""


class Cancelled(NanoInferError):
    """The call was cancelled by somebody else than the code that waits for it."""


class PermissionDenied(NanoInferError):
    """The credentials are missing, wrong or not enough."""


class ServerError(NanoInferError):
    """The server failed; its log has the details under `request_id`."""


_CLASSES: dict[grpc.StatusCode, type[NanoInferError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}


def from_status(
    code: grpc.StatusCode,
    message: str,
    trailing_metadata: Iterable[tuple[str, str | bytes]],
    request_id: str | None = None,
    partial: Completion | None = None,
) -> NanoInferError:
    """Builds the exception of a status. Details that do not parse are left out."""
    reason, metadata, retry_after = None, None, None
    violations: tuple[Violation, ...] = ()
    trailing = [(str(key), value) for key, value in trailing_metadata]
    for detail in _details(trailing):
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason, metadata = info.reason or None, info.metadata
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif detail.Unpack(bad):
            violations = tuple(Violation(v.field, v.description) for v in bad.field_violations)
    return _CLASSES.get(code, ServerError)(
        message,
        code=code,
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_after=retry_after,
        request_id=request_id,
        trace_id=trace_id(trailing),
        partial=partial,
    )


def trace_id(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The trace of a call, where the server named it."""
    found = (value for key, value in trailing_metadata if key == "x-trace-id")
    return next((value for value in found if isinstance(value, str)), None)


def _details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> list[Any]:
    for key, value in trailing_metadata:
        if key == STATUS_DETAILS and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
