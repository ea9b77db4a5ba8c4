"""Admission: who gets in, decided in O(1), reserved before anything is awaited.

Bounds count what is held now: requests, prompt tokens (estimated from bytes until they are known)
and prompt bytes, and requests per tenant where asked for. What does not fit is refused at once.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from nanoinfer_common import names
from nanoinfer_common.errors import exhausted

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


class Reservation:
    """What one request holds; leaving the context gives it back, once."""

    def __init__(
        self, admission: "Admission", tenant: str, num_tokens: int, num_bytes: int
    ) -> None:
        self._admission: Admission | None = admission
        self.tenant = tenant
        self.num_tokens = num_tokens
        self.num_bytes = num_bytes

    def settle(self, num_tokens: int) -> None:
        """Replace the estimate by the true count; what is admitted is never turned away."""
        if self._admission is not None:
            self._admission.num_prompt_tokens += num_tokens - self.num_tokens
            self.num_tokens = num_tokens

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.give_back(self)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Admission:
    """The counts behind the bounds. One event loop owns it; no method awaits."""

    def __init__(self, bounds: Bounds, on_rejection: Callable[[str], None]) -> None:
        self._bounds = bounds
        self._on_rejection = on_rejection
        self._tenants: Counter[str] = Counter()
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self.num_prompt_bytes = 0

    def reserve(
        self, *, tenant: str | None, num_bytes: int, num_tokens: int | None = None
    ) -> Reservation:
        """Take a place; `num_tokens` None is estimated from the bytes.

        Raises RESOURCE_EXHAUSTED with RetryInfo: QUEUE_FULL, or QUOTA_EXCEEDED for the tenant's
        own bound. A prompt larger than a whole bound is let in when nothing else is held.
        """
        if num_tokens is None:
            num_tokens = -(-num_bytes // BYTES_PER_TOKEN)
        tenant = tenant or ""
        self._refuse_tenant(tenant)
        bounds = self._bounds
        if self.num_requests >= bounds.max_requests:
            self._refuse(names.QUEUE_FULL, "requests", "too many requests are under way")
        if self.num_requests and self.num_prompt_tokens + num_tokens > bounds.max_prompt_tokens:
            self._refuse(names.QUEUE_FULL, "prompt_tokens", "too many prompt tokens are under way")
        if self.num_requests and self.num_prompt_bytes + num_bytes > bounds.max_prompt_bytes:
            self._refuse(names.QUEUE_FULL, "prompt_bytes", "too many prompt bytes are under way")
        self.num_requests += 1
        self.num_prompt_tokens += num_tokens
        self.num_prompt_bytes += num_bytes
        self._tenants[tenant] += 1
        return Reservation(self, tenant, num_tokens, num_bytes)

    def give_back(self, reservation: Reservation) -> None:
        """Undo what `reserve` counted; called by the reservation alone."""
        self.num_requests -= 1
        self.num_prompt_tokens -= reservation.num_tokens
        self.num_prompt_bytes -= reservation.num_bytes
        self._tenants[reservation.tenant] -= 1
        if not self._tenants[reservation.tenant]:
            del self._tenants[reservation.tenant]

    def _refuse_tenant(self, tenant: str) -> None:
        bound = self._bounds.max_tenant_requests
        if bound is not None and self._tenants[tenant] >= bound:
            self._refuse(names.QUOTA_EXCEEDED, "tenant", "too many requests of this tenant")

    def _refuse(self, reason: str, bound: str, message: str) -> None:
        self._on_rejection(bound)
        raise exhausted(reason, message, RETRY_AFTER_SECONDS)
