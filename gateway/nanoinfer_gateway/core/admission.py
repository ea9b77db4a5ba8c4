"""Admission: who gets in, decided in O(1), reserved before anything is awaited.

Bounds count what is held now: requests, prompt tokens (estimated from bytes until they are known)
and prompt bytes, and requests per tenant where asked for. What does not fit is refused at once.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError, exhausted

BYTES_PER_TOKEN = 4  # of byte-level BPE on English text and code; replaced by the count once known
RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True)
class Bounds:
    """The most that is held at one time.

    `max_tenant_requests` None means no bound per tenant; callers that name no tenant are one.
    """

    max_requests: int
    max_prompt_tokens: int
    max_prompt_bytes: int
    max_tenant_requests: int | None = None


@dataclass
class Reservation:
    """What one request holds."""

    tenant: str
    num_bytes: int
    num_tokens: int


class Admission:
    """The counts behind the bounds. One event loop owns it; no method awaits."""

    def __init__(self, bounds: Bounds, on_rejection: Callable[[str], None]) -> None:
        self._bounds = bounds
        self._on_rejection = on_rejection
        self._tenants: Counter[str] = Counter()
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self.num_prompt_bytes = 0

    @contextmanager
    def reserve(
        self, *, tenant: str | None, num_bytes: int, num_tokens: int | None = None
    ) -> Iterator[Reservation]:
        """Hold a place while the block runs; `num_tokens` None is estimated from the bytes.

        Raises RESOURCE_EXHAUSTED with RetryInfo: QUEUE_FULL, or QUOTA_EXCEEDED for the tenant's
        own bound. A prompt larger than a whole bound is let in when nothing else is held.
        """
        if num_tokens is None:
            num_tokens = -(-num_bytes // BYTES_PER_TOKEN)
        held = Reservation(tenant or "", num_bytes, num_tokens)
        self._check(held)
        self._count(held, 1)
        try:
            yield held
        finally:
            self._count(held, -1)

    def settle(self, held: Reservation, num_tokens: int) -> None:
        """Replace the estimate by the true count; what is admitted is never turned away."""
        self.num_prompt_tokens += num_tokens - held.num_tokens
        held.num_tokens = num_tokens

    def _count(self, held: Reservation, sign: int) -> None:
        self.num_requests += sign
        self.num_prompt_tokens += sign * held.num_tokens
        self.num_prompt_bytes += sign * held.num_bytes
        self._tenants[held.tenant] += sign
        if not self._tenants[held.tenant]:
            del self._tenants[held.tenant]

    def _check(self, wanted: Reservation) -> None:
        bounds = self._bounds
        quota = bounds.max_tenant_requests
        if quota is not None and self._tenants[wanted.tenant] >= quota:
            raise self._refusal(names.QUOTA_EXCEEDED, "tenant", "requests of this tenant")
        if self.num_requests >= bounds.max_requests:
            raise self._refusal(names.QUEUE_FULL, "requests", "requests")
        if not self.num_requests:
            return
        if self.num_prompt_tokens + wanted.num_tokens > bounds.max_prompt_tokens:
            raise self._refusal(names.QUEUE_FULL, "prompt_tokens", "prompt tokens")
        if self.num_prompt_bytes + wanted.num_bytes > bounds.max_prompt_bytes:
            raise self._refusal(names.QUEUE_FULL, "prompt_bytes", "prompt bytes")

    def _refusal(self, reason: str, bound: str, what: str) -> ServiceError:
        self._on_rejection(bound)
        return exhausted(reason, f"too many {what} are under way", RETRY_AFTER_SECONDS)
