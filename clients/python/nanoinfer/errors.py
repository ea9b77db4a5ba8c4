"""What can go wrong, as typed exceptions: one class for each thing that a caller would do about it.

Every class is a `NanoInferError` and names the statuses that become it; the rest are `ServerError`.
The details are those of `google.rpc`: ErrorInfo, BadRequest, RetryInfo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode as Code

if TYPE_CHECKING:
    from nanoinfer.results import Completion


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that the server refused."""

    field: str
    description: str


_CLASSES: dict[Code, type[NanoInferError]] = {}


@dataclass(eq=False, repr=False)
class NanoInferError(Exception):
    """A call that did not succeed.

    `code` is the gRPC status. `reason` is the stable name of the cause, `metadata` its parameters;
    gRPC's own failures have none. `retry_after` is in seconds. `partial` is what a stream had
    delivered before it broke. `request_id` and `trace_id` lead to the server's logs and spans.
    """

    message: str
    _: KW_ONLY
    code: Code
    reason: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()
    retry_after: float | None = None
    request_id: str | None = None
    trace_id: str | None = None
    partial: Completion | None = None

    def __init_subclass__(cls, codes: tuple[Code, ...] = ()) -> None:
        _CLASSES.update(dict.fromkeys(codes, cls))

    def __str__(self) -> str:
        label = self.code.name if self.reason is None else f"{self.code.name} ({self.reason})"
        return f"{label}: {self.message}"


class InvalidRequest(NanoInferError, codes=(Code.INVALID_ARGUMENT, Code.OUT_OF_RANGE)):
    """The request breaks a rule; `violations` names the fields."""


class NotFound(NanoInferError, codes=(Code.NOT_FOUND,)):
    """The model does not exist here."""


class Unsupported(NanoInferError, codes=(Code.UNIMPLEMENTED,)):
    """The server does not have the feature that the request asks for."""


class PreconditionFailed(NanoInferError, codes=(Code.FAILED_PRECONDITION,)):
    """The server is not set up for it: a feature is switched off, there is no chat template."""


class Overloaded(NanoInferError, codes=(Code.RESOURCE_EXHAUSTED,)):
    """The server is full; `retry_after` says when to try again."""


class TooLarge(NanoInferError):
    """A message or its metadata exceeds a limit of the client or the server; repeating is no help.

    RESOURCE_EXHAUSTED, as `Overloaded` is, but from gRPC itself or with a reason of that kind.
    """


class Unavailable(NanoInferError, codes=(Code.UNAVAILABLE,)):
    """Nobody answers, or the server is starting or ending."""


class DeadlineExceeded(NanoInferError, codes=(Code.DEADLINE_EXCEEDED,)):
    """The call took longer than its `timeout`."""


class Cancelled(NanoInferError, codes=(Code.CANCELLED,)):
    """The call was cancelled by somebody else than the code that waits for it."""


class PermissionDenied(NanoInferError, codes=(Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)):
    """The credentials are missing, wrong or not enough."""


class ServerError(NanoInferError):
    """The server failed; its log has the details under `request_id`."""


# how gRPC's implementations say it; there is no other sign
_SIZES = re.compile(r"(\w+): (\w+) message larger than max \((\d+) vs\. (\d+)\)")
_IS_SIZE = re.compile(r"larger than max|exceeds maximum size|metadata size exceeds", re.IGNORECASE)
_TOO_LARGE = {
    (
        "CLIENT",
        "Sent",
    ): "the request has {} bytes, this client sends at most {} (max_message_bytes)",
    ("CLIENT", "Received"): (
        "the response has {} bytes, this client takes at most {} (max_message_bytes)"
    ),
    ("SERVER", "Received"): "the request has {} bytes, the server takes at most {}",
    ("SERVER", "Sent"): "the response has {} bytes, the server sends at most {}",
}


def _class(code: Code, reason: str | None, message: str) -> type[NanoInferError]:
    if code is Code.RESOURCE_EXHAUSTED and (
        reason.endswith("_TOO_LARGE") if reason else _IS_SIZE.search(message)
    ):
        return TooLarge
    return _CLASSES.get(code, ServerError)


def _explained(message: str) -> str:
    """gRPC's own words on sizes, with the limit's name."""
    found = _SIZES.search(message)
    text = found and _TOO_LARGE.get((found[1], found[2]))
    if found and text:
        return text.format(f"{int(found[3]):,}", f"{int(found[4]):,}")
    return message.replace("received metadata size", "the size of the metadata (headers)")


def from_status(status: Any, request_id: str, partial: Completion | None) -> NanoInferError:
    """Builds the exception of a grpc.RpcError. Details that do not parse are left out."""
    trailing = {key: value for key, value in status.trailing_metadata() or ()}
    details = status_pb2.Status()
    with suppress(DecodeError):
        details.ParseFromString(trailing.get("grpc-status-details-bin", b""))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in details.details:
        for kind in (info, bad, retry):
            detail.Unpack(kind)
    retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    message = status.details() or ""
    kind = _class(status.code(), info.reason or None, message)
    return kind(
        _explained(message) if kind is TooLarge and not info.reason else message,
        code=status.code(),
        reason=info.reason or None,
        metadata=dict(info.metadata),
        violations=tuple(Violation(v.field, v.description) for v in bad.field_violations),
        retry_after=retry_after if retry.HasField("retry_delay") else None,
        request_id=request_id,
        trace_id=trailing.get("x-trace-id"),
        partial=partial,
    )
