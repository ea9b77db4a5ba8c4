"""What the engine's core can refuse or lose, as plain exceptions; the service gives them a status.

EngineError
├── CapacityError     refused: the request can never fit the KV cache
├── QueueFullError    refused: the waiting queue is full
├── QueueTimeoutError ended: it waited too long to start
├── NotReadyError     refused: the engine is still loading
├── DrainingError     refused, or ended unfinished: the engine drains
├── StalledReaderError ended: nobody took the request's tokens for too long
└── EngineLostError   refused or ended: a step failed, and with it everything that ran

RankError stands beside them: one of the processes that share a model is gone.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything that the core raises on purpose or ends a request with."""


class CapacityError(EngineError):
    """Prompt and asked completion need more of the KV cache than there is."""

    def __init__(self, num_tokens: int, capacity: int) -> None:
        """Both figures are in tokens."""
        super().__init__(
            f"prompt and max_tokens need {num_tokens} tokens of KV cache, which holds {capacity}"
        )
        self.num_tokens = num_tokens
        self.capacity = capacity


class QueueFullError(EngineError):
    """The queue's bound on `requests` or on `tokens` is reached."""

    def __init__(self, bound: str, retry_after: float) -> None:
        """`bound` is `requests` or `tokens`; `retry_after` estimates seconds until it has room."""
        super().__init__(f"the queue is full: no room for more {bound}")
        self.bound = bound
        self.retry_after = retry_after


class QueueTimeoutError(EngineError):
    """A request did not start within the time that the queue allows."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is that time, and what to wait before another try."""
        super().__init__(f"the request did not start within {seconds:g} s")
        self.retry_after = seconds


class NotReadyError(EngineError):
    """Weights are still loading."""


class DrainingError(EngineError):
    """The engine takes no new requests, and ends those that outlast its grace."""


class StalledReaderError(EngineError):
    """A client left too many tokens unread for too long."""


class EngineLostError(EngineError):
    """A step failed as a whole; its cause is in `__cause__` and in the log."""


class SamplingError(Exception):
    """A row whose logits or options allow no choice; it ends that request alone."""


class RowError(Exception):
    """A row gave another number of tokens than it could; it ends that request alone."""


class RankError(Exception):
    """A rank failed or ended: no step of the others will ever end."""


def is_memory_error(error: BaseException) -> bool:
    """Whether a step lacked memory, on the device or the host, and a smaller one may not."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def is_device_error(error: BaseException) -> bool:
    """Whether the device is gone with this error: a CUDA fault, but not CUDA's lack of memory.

    A rank that is gone is as bad.
    Newer versions of torch have a class for it, all of them a RuntimeError with this text.
    """
    is_fault = isinstance(error, RuntimeError) and "CUDA error" in str(error)
    return isinstance(error, RankError) or (is_fault and not is_memory_error(error))
