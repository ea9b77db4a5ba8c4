"""What each of the core's errors is on the wire."""

from __future__ import annotations

import grpc
from nanoinfer_common import errors, names
from nanoinfer_common.errors import ServiceError, Violation

from nanoinfer_engine.core.errors import (
    CapacityError,
    DrainingError,
    EngineError,
    EngineLostError,
    NotReadyError,
    QueueFullError,
    QueueTimeoutError,
    StalledReaderError,
)
from nanoinfer_engine.core.request import FinishReason, RequestOutput

RETRY_SECONDS = 1.0


def refusal_status(error: EngineError) -> ServiceError:
    """The status of a request that was refused before it ran."""
    if isinstance(error, CapacityError):
        return ServiceError(
            grpc.StatusCode.INVALID_ARGUMENT,
            names.EXCEEDS_KV_CAPACITY,
            str(error),
            metadata={"tokens": str(error.num_tokens), "capacity": str(error.capacity)},
            violations=[Violation("stopping.max_tokens", str(error))],
        )
    if isinstance(error, QueueFullError):
        return errors.exhausted(names.QUEUE_FULL, str(error), error.retry_after)
    if isinstance(error, QueueTimeoutError):
        return errors.exhausted(names.QUEUE_TIMEOUT, str(error), error.retry_after)
    if isinstance(error, NotReadyError):
        return errors.unavailable(names.LOADING, str(error), RETRY_SECONDS)
    if isinstance(error, DrainingError):
        return errors.unavailable(names.SHUTTING_DOWN, str(error), RETRY_SECONDS)
    if isinstance(error, EngineLostError):
        return errors.unavailable(names.ENGINE_LOST, str(error), RETRY_SECONDS)
    raise error


def failure(output: RequestOutput, num_sent_tokens: int) -> Exception | None:
    """Why a stream must end badly after `output`; None if it need not.

    What is not of the core's making is returned as it is: the server answers INTERNAL and logs it.
    """
    error = output.error
    if output.finish_reason is FinishReason.DEADLINE:
        message = "the deadline has passed"
        return ServiceError(grpc.StatusCode.DEADLINE_EXCEEDED, names.DEADLINE_EXCEEDED, message)
    if output.finish_reason is FinishReason.CANCELLED:
        return ServiceError(grpc.StatusCode.CANCELLED, names.CANCELLED, "cancelled")
    if isinstance(error, StalledReaderError):
        return ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, names.STREAM_STALLED, str(error))
    if isinstance(error, EngineLostError) and num_sent_tokens:
        return ServiceError(
            grpc.StatusCode.UNAVAILABLE,
            names.ENGINE_LOST_MID_STREAM,
            str(error),
            metadata={"outputTokens": str(num_sent_tokens)},
        )
    if isinstance(error, EngineError):
        return refusal_status(error)
    return error
