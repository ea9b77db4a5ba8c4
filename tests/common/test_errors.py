"""Errors survive the way over the wire, and stay small."""

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata
from nanoinfer_common import errors, names
from nanoinfer_common.errors import ServiceError, Violation

from tests.common.conftest import start_probe
from tests.common.probe import call

CASES = [
    errors.invalid("INVALID_PROMPT", "bad", Violation("prompt", "must not be empty")),
    errors.unimplemented("no logprobs", "FEATURE_LOGPROBS", "response.logprobs"),
    errors.not_found_model("gpt"),
    errors.exhausted("QUEUE_FULL", "full", 0.25),
    errors.unavailable("ENGINE_LOST", "lost"),
    errors.unavailable("SHUTTING_DOWN", "going", 1.0),
    errors.precondition("TOKENIZER_MISMATCH", "other", expected="aa", got="bb"),
    errors.internal(),
    ServiceError(grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST_MID_STREAM", "n", metadata={"a": "1"}),
]


def unpack(status: status_pb2.Status, kind: type[Any]) -> Any:
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None


@pytest.mark.parametrize("error", CASES, ids=repr)
async def test_round_trip(error: ServiceError) -> None:
    async def fail(request: bytes, context: Any) -> None:
        raise error

    async with start_probe() as probe:
        probe.service.act = fail  # type: ignore[method-assign]
        for method in ("unary_unary", "unary_stream"):
            with pytest.raises(AioRpcError) as caught:
                await call(probe.channel, method, b"")
            returned = errors.from_rpc_error(caught.value)
            assert returned.code is error.code
            assert returned.reason == error.reason
            assert returned.message == error.message
            assert returned.metadata == error.metadata
            assert returned.violations == error.violations
            assert returned.retry_after == error.retry_after


def test_details_per_code() -> None:
    status = errors.to_status(CASES[0], "nanoinfer-engine", "id")
    info = unpack(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("INVALID_PROMPT", "nanoinfer-engine")
    (violation,) = unpack(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("prompt", "must not be empty")
    assert unpack(status, error_details_pb2.RequestInfo) is None

    resource = unpack(errors.to_status(CASES[2], "d"), error_details_pb2.ResourceInfo)
    assert resource.resource_name == "gpt"
    retry = unpack(errors.to_status(CASES[3], "d"), error_details_pb2.RetryInfo)
    assert retry.retry_delay.nanos == 250_000_000
    request = unpack(errors.to_status(errors.internal(), "d", "id"), error_details_pb2.RequestInfo)
    assert request.request_id == "id"


@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 100_000, "💥" * 100_000])
def test_statuses_stay_within_two_kilobytes(text: str) -> None:
    violations = [Violation(f"messages[{index}].{text}", text) for index in range(1000)]
    metadata = {f"key{index}": text for index in range(20)}
    error = ServiceError(
        grpc.StatusCode.INVALID_ARGUMENT, "X_Y", text, metadata=metadata, violations=violations
    )
    status = errors.to_status(error, "nanoinfer-gateway", "r" * 128)
    assert len(status.message.encode()) + status.ByteSize() <= 2048
    assert unpack(status, error_details_pb2.ErrorInfo).reason == "X_Y"
    assert errors.not_found_model(text).message.endswith("is not served here")


def test_many_violations_keep_the_first() -> None:
    violations = [Violation(f"stop[{index}]", "must be 1 to 256 bytes") for index in range(200)]
    status = errors.to_status(errors.invalid("X_Y", "bad", *violations), "d")
    kept = unpack(status, error_details_pb2.BadRequest).field_violations
    assert 10 < len(kept) < 200
    assert kept[0].field == "stop[0]"


@pytest.mark.parametrize(
    "details",
    [None, b"\xff\xff garbage", b"", status_pb2.Status(code=3, message="m").SerializeToString()],
)
def test_foreign_errors_keep_their_code(details: bytes | None) -> None:
    trailing = Metadata() if details is None else Metadata((names.STATUS_DETAILS, details))
    error = AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), trailing, "gone", None)
    returned = errors.from_rpc_error(error)
    assert (returned.code, returned.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert returned.message == "gone"
    assert returned.retry_after is None


def test_reasons_and_metadata_keys_have_their_form() -> None:
    for error in CASES:
        assert error.reason.replace("_", "").isalnum()
        assert error.reason == error.reason.upper()
        assert all(key[0].islower() and key.isalnum() for key in error.metadata)
    reasons = {value for name, value in vars(names).items() if name == value}
    assert {"QUEUE_FULL", "INTERNAL"} <= reasons
    assert all(len(reason) <= 63 for reason in reasons)
