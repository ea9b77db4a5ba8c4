"""The error vocabulary and its one mapping to gRPC statuses (AIP-193).

`ServiceError` is what handlers raise; `to_status` turns it into a `google.rpc.Status` with
ErrorInfo, and BadRequest, RetryInfo, ResourceInfo or RequestInfo where they apply. Message and
details together stay within 2 KiB, because larger ones are lost on the way.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from nanoinfer_common import names

# The canonical codes, for rooms that know no transport; every face has its own mapping of them.
Code: TypeAlias = grpc.StatusCode

MAX_STATUS_BYTES = 2048
MAX_TEXT_BYTES = 512


class Violation(NamedTuple):
    """Names a bad field, such as `sampling.top_p`, and says what it must be."""

    field: str
    description: str


class ServiceError(Exception):
    """Ends a call with a status. `retry_after` is in seconds; `metadata` keys are camelCase."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after

    def __repr__(self) -> str:
        return f"ServiceError({self.code.name}, {self.reason}, {self.message!r})"


class StartError(Exception):
    """The service cannot start; the message tells the operator why, without a traceback."""


def invalid(reason: str, message: str, *violations: Violation) -> ServiceError:
    """Returns INVALID_ARGUMENT: the request is wrong, whoever serves it."""
    return ServiceError(
        grpc.StatusCode.INVALID_ARGUMENT, reason, message, violations=tuple(violations)
    )


def unimplemented(message: str, feature: str, field: str = "") -> ServiceError:
    """Returns UNIMPLEMENTED for a feature (`FEATURE_LOGPROBS`) that this server lacks."""
    metadata = {"feature": feature} | ({"field": field} if field else {})
    return ServiceError(
        grpc.StatusCode.UNIMPLEMENTED, names.FEATURE_DISABLED, message, metadata=metadata
    )


def not_found_model(name: str) -> ServiceError:
    """Returns NOT_FOUND for a model that is not served."""
    shown = _clip(name, 128)
    return ServiceError(
        grpc.StatusCode.NOT_FOUND,
        names.MODEL_NOT_FOUND,
        f"model {shown!r} is not served here",
        metadata={"model": shown},
    )


def exhausted(reason: str, message: str, retry_after: float) -> ServiceError:
    """Returns RESOURCE_EXHAUSTED: capacity exists, but others use it; worth a retry later."""
    return ServiceError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after=retry_after
    )


def unavailable(reason: str, message: str, retry_after: float | None = None) -> ServiceError:
    """Returns UNAVAILABLE: there is no capacity here now; another replica may have some."""
    return ServiceError(grpc.StatusCode.UNAVAILABLE, reason, message, retry_after=retry_after)


def precondition(reason: str, message: str, **metadata: str) -> ServiceError:
    """Returns FAILED_PRECONDITION: the request is well formed, but does not fit this server."""
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, reason, message, metadata=metadata)


def internal(message: str = "internal error") -> ServiceError:
    """Returns INTERNAL. The message reaches the client, so it tells nothing of the inside."""
    return ServiceError(grpc.StatusCode.INTERNAL, names.INTERNAL, message)


def to_status(error: ServiceError, domain: str, request_id: str | None = None) -> status_pb2.Status:
    """Builds the rich status of at most 2 KiB; violations beyond that are left out, last first.

    `domain` is the service's DNS name; `request_id` goes into the details of INTERNAL.
    """
    # Each takes more than 16 bytes, so no more than this many can fit.
    violations = list(error.violations[: MAX_STATUS_BYTES // 16])
    metadata = {key: _clip(value, 256) for key, value in error.metadata.items()}
    while True:
        status = status_pb2.Status(
            code=error.code.value[0], message=_clip(error.message, MAX_TEXT_BYTES)
        )
        for detail in _details(error, domain, request_id, metadata, violations):
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        # The message travels twice: as grpc-message and inside the packed status.
        size = status.ByteSize() + len(status.message.encode())
        if size <= MAX_STATUS_BYTES:
            return status
        if violations:
            violations.pop()
        elif metadata:
            metadata.popitem()
        else:
            return status_pb2.Status(code=status.code, message=_clip(status.message, 256))


def from_rpc_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """Reads a call's failure back. Without ErrorInfo the reason is the code's name."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in _packed_status(error).details:
        for known in (info, bad_request, retry):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    delay = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
    return ServiceError(
        error.code(),
        info.reason or error.code().name,
        error.details() or error.code().name,
        metadata=dict(info.metadata),
        violations=[Violation(v.field, v.description) for v in bad_request.field_violations],
        retry_after=delay,
    )


def _packed_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    status = status_pb2.Status()
    trailing = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    for key, value in trailing:
        if key == names.STATUS_DETAILS and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:
                # Broken details must not hide the code, which is known without them.
                status.Clear()
    return status


def _details(
    error: ServiceError,
    domain: str,
    request_id: str | None,
    metadata: Mapping[str, str],
    violations: Sequence[Violation],
) -> list[Message]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=metadata)
    ]
    if violations:
        bad_request = error_details_pb2.BadRequest()
        for field, description in violations:
            bad_request.field_violations.add(
                field=_clip(field, 128), description=_clip(description, 256)
            )
        details.append(bad_request)
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.code is grpc.StatusCode.NOT_FOUND and "model" in metadata:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type="nanoinfer.v1.ModelInfo", resource_name=metadata["model"]
            )
        )
    if error.code is grpc.StatusCode.INTERNAL and request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    return details


def _clip(text: str, max_bytes: int) -> str:
    raw = text[: max_bytes + 1].encode("utf-8", "replace")
    return text if len(raw) <= max_bytes else raw[: max_bytes - 3].decode("utf-8", "ignore") + "..."
