"""The step being planned: who is granted how many tokens, and how many there are to grant."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from nanoinfer_engine.core.request import Request

# Steps that went well, after which a step may be twice as large again.
_STEPS_TO_GROW = 256
ORDER = attrgetter("order")


def split(running: Iterable[Request]) -> tuple[list[Request], list[Request]]:
    """Of running requests who wants but one token, and who needs more, both in their order."""
    decodes, prefills = [], []
    for request in sorted(running, key=ORDER):
        num_tokens = request.num_pending_tokens
        if num_tokens > 1:
            prefills.append(request)
        elif num_tokens and request.wants_more:
            decodes.append(request)
    return decodes, prefills


@dataclass
class Plan:
    """Tokens granted to each request, and what is left to grant."""

    budget: int
    grants: dict[Request, int] = field(default_factory=dict)

    def grant(self, request: Request, num_tokens: int) -> None:
        """Grant tokens to a request that has none yet."""
        self.grants[request] = num_tokens
        self.budget -= num_tokens

    def cap(self, max_tokens: int) -> None:
        """Let the step have no more tokens in all, but for those that are granted already."""
        self.budget = min(self.budget, max(max_tokens - sum(self.grants.values()), 0))

    def revoke(self, request: Request) -> None:
        """Take back what the request was granted, if anything."""
        self.budget += self.grants.pop(request, 0)


class StepsInFlight:
    """Who is behind the rows of each step that has begun and not ended, the oldest step first."""

    def __init__(self) -> None:
        """None has begun."""
        self._steps: deque[dict[Request, int]] = deque()  # with the preemptions of each until then

    def begin(self, requests: Iterable[Request]) -> None:
        """A step has begun; `requests` in the order of its rows."""
        self._steps.append({request: request.num_preemptions for request in requests})

    def last_rows(self) -> dict[Request, int]:
        """The row of each request in the step that began last, where that has not ended."""
        last = self._steps[-1] if self._steps else {}
        return {request: row for row, request in enumerate(last)}

    def end(self) -> list[tuple[Request, bool]]:
        """The oldest step has ended; its requests, and whether each was preempted since."""
        return [(r, r.num_preemptions > before) for r, before in self._steps.popleft().items()]

    def clear(self) -> None:
        """All of them were lost."""
        self._steps.clear()


class StepLimit:
    """Most tokens of a step: the setting's, or less for a while after memory ran out."""

    def __init__(self, max_batch_tokens: int) -> None:
        """Begin with `max_batch_tokens`, which is never exceeded."""
        self.num_tokens = max_batch_tokens
        self._most = max_batch_tokens
        self._num_good_steps = 0

    def shrink(self) -> bool:
        """Halve; False where a step cannot be smaller."""
        self._num_good_steps = 0
        self.num_tokens //= 2
        if self.num_tokens:
            return True
        self.num_tokens = 1
        return False

    def record_success(self) -> None:
        """A step went well."""
        self._num_good_steps += 1
        if self._num_good_steps % _STEPS_TO_GROW == 0:
            self.num_tokens = min(self._most, 2 * self.num_tokens)
