"""The step being planned: who is granted how many tokens, and how many there are to grant."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoinfer_engine.request import Request

# Steps that went well, after which a step may be twice as large again.
_STEPS_TO_GROW = 256


@dataclass
class Plan:
    """Tokens granted to each request, and what is left to grant."""

    budget: int
    grants: dict[Request, int] = field(default_factory=dict)

    def grant(self, request: Request, num_tokens: int) -> None:
        """Grant tokens to a request that has none yet."""
        self.grants[request] = num_tokens
        self.budget -= num_tokens

    def revoke(self, request: Request) -> None:
        """Take back what the request was granted, if anything."""
        self.budget += self.grants.pop(request, 0)


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
