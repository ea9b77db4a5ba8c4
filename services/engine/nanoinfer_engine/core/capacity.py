"""How long one request can become, and how busy the engine is: plain data, no torch, no threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.errors import CapacityError
from nanoinfer_engine.core.request import Request


@dataclass(frozen=True)
class Capacity:
    """How long one request can become: in the model's context, and in the KV cache."""

    max_model_len: int
    kv_tokens: int

    @property
    def max_output_tokens(self) -> int:
        """Most tokens of one completion, that of a one-token prompt."""
        return min(self.max_model_len, self.kv_tokens) - 1

    def max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        """Completion tokens to allow. Unset: the room left in context and KV cache.

        A value beyond the context's room is clamped to it. Raises CapacityError where the prompt
        leaves the KV cache no room, or where the value asked for needs more than it has.
        """
        model_room = self.max_model_len - num_prompt_tokens
        kv_room = self.kv_tokens - num_prompt_tokens
        wanted = 1 if asked is None else min(asked, model_room)
        self.check(num_prompt_tokens, wanted)
        return min(model_room, kv_room) if asked is None else wanted

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise CapacityError for a request that the KV cache could not hold to its end."""
        num_tokens = num_prompt_tokens + max_tokens
        if num_tokens > self.kv_tokens:
            raise CapacityError(num_tokens, self.kv_tokens)


@dataclass(frozen=True)
class Load:
    """How busy the engine is at one moment; `kv_usage` is a share, 0 to 1."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_prompt_tokens: int = 0
    waiting_bytes: int = 0
    kv_usage: float = 0.0

    def with_waiting(self, requests: Sequence[Request]) -> Load:
        """This load and `requests` in the queue."""
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        num_bytes = sum(request.num_bytes for request in requests)
        return replace(
            self,
            num_waiting=self.num_waiting + len(requests),
            waiting_prompt_tokens=self.waiting_prompt_tokens + num_tokens,
            waiting_bytes=self.waiting_bytes + num_bytes,
        )

    def bound_beyond(self, config: EngineConfig) -> str | None:
        """The bound of the queue that this load is beyond; None where it fits."""
        return next((name for name, value, most in self._bounds(config) if value > most), None)

    def is_full(self, config: EngineConfig) -> bool:
        """Whether the queue has no room for anything."""
        return any(value >= most for _, value, most in self._bounds(config))

    def _bounds(self, config: EngineConfig) -> tuple[tuple[str, int, int], ...]:
        return (
            ("requests", self.num_waiting, config.max_waiting_requests),
            ("tokens", self.waiting_prompt_tokens, config.max_waiting_tokens),
            ("bytes", self.waiting_bytes, config.max_waiting_bytes),
        )
