"""One engine replica in virtual time. Times are in seconds; calibration.json names the sources."""

from __future__ import annotations

import heapq
import json
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MAX_WAITING = 256  # the engine's default
MAX_STEPS_AT_ONCE = 64  # equal decode steps are jumped over, but the growing context must be felt


@cache
def calibration() -> dict[str, Any]:
    """The calibration file."""
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / "calibration.json").read_text())
    return loaded


def cost(name: str) -> float:
    """CPU seconds of one unit of work."""
    return float(calibration()["costs"][name]["value"]) * 1e-6


@dataclass(frozen=True)
class Workload:
    """Tokens of a request; completions are uniform within ± `spread` of their mean."""

    prompt_tokens: int
    completion_tokens: int
    spread: float = 0.5

    @property
    def max_tokens(self) -> int:
        """Most tokens of one request."""
        return self.prompt_tokens + round(self.completion_tokens * (1 + self.spread))


class Profile:
    """Step times of an engine, interpolated between the calibrated batch sizes."""

    def __init__(self, name: str, **changed: object) -> None:
        facts = calibration()["engines"][name] | changed
        self.max_batch = int(facts["max_batch_requests"])
        self.max_batch_tokens = int(facts["max_batch_tokens"])
        self.start_seconds = float(facts["start_seconds"])
        self.prefill_rate = float(facts["prefill_tokens_per_second"])
        self.kv_tokens = float(facts["kv_cache_bytes"] / facts["kv_bytes_per_token"])
        self._context = float(facts["step_context"])
        bandwidth = float(facts["memory_gb_per_second"]) * 1e9
        self._token_seconds = float(facts["kv_bytes_per_token"]) / bandwidth
        rows, steps = zip(*((int(k), v / 1e3) for k, v in facts["step_ms"].items()), strict=True)
        sizes = np.arange(self.max_batch + 1)
        self._base: list[float] = [0.0, *np.interp(sizes, rows, steps)[1:].tolist()]

    def step_seconds(self, rows: int, context_tokens: float) -> float:
        """Time of a decode step; KV beyond the calibrated context costs bandwidth."""
        extra = (context_tokens - rows * self._context) * self._token_seconds
        return max(self._base[rows] + extra, 0.5 * self._base[rows])

    def capacity(self, work: Workload, rows: int) -> float:
        """Requests a second of one replica with `rows` streams: prefill and decode add up."""
        context = work.prompt_tokens + work.completion_tokens / 2
        step = self.step_seconds(rows, rows * context)
        return 1 / (work.prompt_tokens / self.prefill_rate + work.completion_tokens * step / rows)


@dataclass(eq=False)
class Request:
    """One request and its times; None for what has not happened."""

    arrived: float
    prompt_tokens: int
    completion_tokens: int
    first_token: float | None = None
    finished: float | None = None


class Engine:
    """Continuous batching with chunked prefill: decodes, then begun prompts, then the queue."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.waiting: deque[Request] = deque()
        self._prefill: dict[Request, int] = {}
        self._decoding: list[tuple[int, int, Request]] = []  # by the step that ends them
        self._steps = self._admitted = 0
        self._now = 0.0
        self._kv_held = 0

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._prefill) + len(self._decoding)

    @property
    def in_flight(self) -> int:
        """Requests in the batch and in the queue."""
        return self.running + len(self.waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use."""
        return self._kv_held / self._profile.kv_tokens

    @property
    def load(self) -> float:
        """The gateway's rank of a replica: those that wait count twice."""
        return self.running + 2 * len(self.waiting) + self.kv_usage

    def submit(self, request: Request) -> None:
        """Queue a request; it starts at the next step's boundary."""
        self.advance(request.arrived)
        if not self.in_flight:
            self._now = request.arrived
        self.waiting.append(request)

    def advance(self, until: float) -> None:
        """Run the steps that begin before a moment; the last one may end after it."""
        while self.in_flight and self._now < until:
            self._step(until)

    def _step(self, until: float) -> None:
        """One step with prompt tokens in it, or as many equal decode steps as there is time for."""
        profile, rows, chunks = self._profile, len(self._decoding), []
        budget = profile.max_batch_tokens - rows
        while self.waiting and self.running < profile.max_batch:
            if sum(self._prefill.values()) >= budget:
                break
            request = self.waiting.popleft()
            self._prefill[request] = request.prompt_tokens
        for request, left in self._prefill.items():
            if (tokens := min(left, budget)) > 0:
                chunks.append((request, tokens))
                budget -= tokens
        held = self._kv_held - sum(r.prompt_tokens - left for r, left in self._prefill.items())
        seconds = profile.step_seconds(rows, held) if rows else 0.0
        seconds += sum(tokens for _, tokens in chunks) / profile.prefill_rate
        seconds = max(seconds, profile.step_seconds(1, 0))
        steps = 1
        if not chunks:
            steps = 1 + int((until - self._now) / seconds)
            steps = min(steps, self._decoding[0][0] - self._steps, MAX_STEPS_AT_ONCE)
        self._now += steps * seconds
        self._steps += steps
        self._kv_held += rows * steps
        self._finish(chunks)

    def _finish(self, chunks: list[tuple[Request, int]]) -> None:
        """Note first tokens and ends."""
        for request, tokens in chunks:
            self._kv_held += tokens
            self._prefill[request] -= tokens
            if not self._prefill[request]:
                del self._prefill[request]
                request.first_token = self._now
                self._admitted += 1
                last = self._steps + request.completion_tokens - 1
                heapq.heappush(self._decoding, (last, self._admitted, request))
        while self._decoding and self._decoding[0][0] <= self._steps:
            request = heapq.heappop(self._decoding)[2]
            self._kv_held -= request.prompt_tokens + request.completion_tokens - 1
            request.finished = self._now
