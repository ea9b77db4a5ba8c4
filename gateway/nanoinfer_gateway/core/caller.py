"""The sender of a request, described alike by every face."""

import time
from dataclasses import dataclass

from nanoinfer_common import names
from nanoinfer_common.errors import Code, ServiceError

HOP_MARGIN_SECONDS = 0.05


@dataclass(frozen=True)
class Caller:
    """Identity, priority and deadline of a request; the trace travels in OpenTelemetry's context.

    `deadline` is in seconds of the monotonic clock; None means that there is none.
    """

    request_id: str = ""
    priority: int = 0
    tenant: str | None = None
    deadline: float | None = None

    def timeout(self, cap: float | None = None) -> float | None:
        """Return min(remaining - 50 ms, cap) in seconds; DEADLINE_EXCEEDED once that is spent."""
        if self.deadline is None:
            return cap
        remaining = self.deadline - time.monotonic() - HOP_MARGIN_SECONDS
        if remaining <= 0:
            raise deadline_exceeded()
        return remaining if cap is None else min(remaining, cap)


def deadline_exceeded() -> ServiceError:
    """Return DEADLINE_EXCEEDED."""
    return ServiceError(Code.DEADLINE_EXCEEDED, names.DEADLINE_EXCEEDED, "the deadline is over")
