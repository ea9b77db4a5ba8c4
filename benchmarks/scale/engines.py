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
    """Continuous batching with chunked prefill: decodes first, then the prompts of the queue."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.waiting: deque[Request] = deque()
        self._decoding: list[tuple[int, int, Request]] = []  # by the step that ends them
        self._steps = self._admitted = self._kv_held = 0
        self._computed = 0  # tokens of the first prompt in the queue
        self._now = 0.0

    @property
    def running(self) -> int:
        """Requests that decode."""
        return len(self._decoding)

    @property
    def in_flight(self) -> int:
        """Requests that decode or wait, prompts that are being computed among them."""
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
        profile, rows, started, prompt_tokens = self._profile, self.running, list[Request](), 0
        while self.waiting and rows + len(started) < profile.max_batch:
            left = self.waiting[0].prompt_tokens - self._computed
            tokens = min(left, profile.max_batch_tokens - rows - prompt_tokens)
            prompt_tokens += tokens
            if tokens < left:
                self._computed += tokens
                break
            started.append(self.waiting.popleft())
            self._computed = 0
        seconds = profile.step_seconds(rows, self._kv_held) + prompt_tokens / profile.prefill_rate
        seconds = max(seconds, profile.step_seconds(1, 0))
        steps = 1
        if not prompt_tokens:
            steps = 1 + int((until - self._now) / seconds)
            steps = min(steps, self._decoding[0][0] - self._steps, MAX_STEPS_AT_ONCE)
        self._now += steps * seconds
        self._steps += steps
        self._kv_held += rows * steps
        for request in started:
            request.first_token = self._now
            self._admitted += 1
            self._kv_held += request.prompt_tokens
            last = self._steps + request.completion_tokens - 1
            heapq.heappush(self._decoding, (last, self._admitted, request))
        while self._decoding and self._decoding[0][0] <= self._steps:
            request = heapq.heappop(self._decoding)[2]
            self._kv_held -= request.prompt_tokens + request.completion_tokens - 1
            request.finished = self._now
