"""The three services as queues in virtual time: FIFO stations for gateways and tokenizers, engines.

Times are in seconds. Costs come from calibration.json, which says of each where it is from. Not
modelled: the network, prefix reuse, failures, preemption (a workload that may need it is refused).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from nanoinfer_common.json_files import read_object

# a jump over equal decode steps is cut here, so that the growing context is felt
MAX_STEPS_AT_ONCE = 64


@cache
def calibration() -> dict[str, Any]:
    """The calibration file."""
    return read_object(Path(__file__).parent / "calibration.json")


def cost(name: str) -> float:
    """A cost in seconds; what is no time (reports a second) as it is."""
    entry = calibration()["costs"][name]
    return float(entry["value"]) * (1e-6 if entry["unit"].startswith("µs") else 1.0)


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
    """Step times of one engine replica, between the calibrated batch sizes by straight lines."""

    def __init__(self, name: str, **changed: object) -> None:
        facts = calibration()["engines"][name] | changed
        self.max_batch = int(facts["max_batch_requests"])
        self.max_batch_tokens = int(facts["max_batch_tokens"])
        self.max_waiting = 256
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
        """Time of a decode step; reading more or less KV than calibrated costs bandwidth."""
        extra = (context_tokens - rows * self._context) * self._token_seconds
        return max(self._base[rows] + extra, 0.5 * self._base[rows])

    def capacity(self, work: Workload, rows: int) -> float:
        """Requests a second of one replica that keeps `rows` streams: prefill and decode add up."""
        context = work.prompt_tokens + work.completion_tokens / 2
        step = self.step_seconds(rows, rows * context)
        return 1 / (work.prompt_tokens / self.prefill_rate + work.completion_tokens * step / rows)


class Station:
    """`servers` equal workers behind one FIFO queue (Kiefer and Wolfowitz's recursion).

    `background` is the share of every worker that other work takes.
    """

    def __init__(self, servers: int = 1, born: float = float("-inf")) -> None:
        self._free = [0.0] * servers
        self.background = 0.0
        self.busy = 0.0
        self.born = born
        self.phase = 0.0
        self.in_flight = 0

    def serve(self, now: float, work: float) -> float:
        """Takes a job; returns when it is done. Calls come in the order of time."""
        end = max(now, self._free[0]) + work / (1 - self.background)
        heapq.heapreplace(self._free, end)
        self.busy += work
        return end


@dataclass(eq=False)
class Request:
    """One request and what happened to it; None where it did not."""

    arrived: float
    prompt_tokens: int
    completion_tokens: int
    gateway: Station
    first_token: float | None = None
    finished: float | None = None


class Clock:
    """Virtual time: callbacks in the order of their times, ties in the order of their making."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._made = 0

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Run `action` at `time`."""
        self._made += 1
        heapq.heappush(self._events, (time, self._made, action))

    def run(self, until: float) -> None:
        """Run everything up to a time; stop earlier if nothing is left."""
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()


@dataclass
class _Run:
    """Equal steps under way: when they began, how long each is, how many, what prefill they do."""

    began: float
    seconds: float
    steps: int
    chunks: list[tuple[Request, int]] = field(default_factory=list)


class Engine:
    """Continuous batching with chunked prefill, as the scheduler does it: decodes first, then the
    prompts begun, then the head of the queue; all in one step of at most `max_batch_tokens`.
    """

    def __init__(self, profile: Profile, clock: Clock, on_token: Callable[[Request], None]) -> None:
        self._profile, self._clock, self._on_token = profile, clock, on_token
        self.waiting: deque[Request] = deque()
        self._prefill: dict[Request, int] = {}
        self._decoding: list[tuple[int, int, Request]] = []
        self._steps = self._admitted = 0
        self._run: _Run | None = None
        self.kv_held = 0.0
        self._times, self._loads = [0.0], [0.0]

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._prefill) + len(self._decoding)

    @property
    def in_flight(self) -> int:
        """Requests here."""
        return self.running + len(self.waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use."""
        return self.kv_held / self._profile.kv_tokens

    @property
    def load(self) -> float:
        """The gateway's rank of a replica: those that wait count twice."""
        return self.running + 2 * len(self.waiting) + self.kv_usage

    def load_at(self, time: float) -> float:
        """The load as it was at a moment of the last second."""
        return self._loads[max(bisect_right(self._times, time) - 1, 0)]

    def _note_load(self) -> None:
        self._times.append(self._clock.now)
        self._loads.append(self.load)
        if len(self._times) > 1024:
            kept = bisect_right(self._times, self._clock.now - 1) - 1
            del self._times[:kept], self._loads[:kept]

    def submit(self, request: Request) -> None:
        """Queue a request; it is seen at the next step's boundary."""
        self.waiting.append(request)
        self._note_load()
        run = self._run
        if run is None:
            self._begin()
        elif run.steps > 1 and self.running < self._profile.max_batch:
            done = min(int((self._clock.now - run.began) / run.seconds) + 1, run.steps)
            if done < run.steps:
                self._start(_Run(run.began, run.seconds, done))

    def _start(self, run: _Run) -> None:
        self._run = run
        self._clock.at(run.began + run.steps * run.seconds, lambda: self._end(run))

    def _begin(self) -> None:
        """Plan what comes next: one step with prefill, or decode steps up to the next end."""
        rows = len(self._decoding)
        budget, chunks = self._profile.max_batch_tokens - rows, []
        while self.waiting and self.running < self._profile.max_batch:
            if sum(self._prefill.values()) >= budget:
                break
            request = self.waiting.popleft()
            self._prefill[request] = request.prompt_tokens
        for request, left in self._prefill.items():
            if (tokens := min(left, budget)) > 0:
                chunks.append((request, tokens))
                budget -= tokens
        self._note_load()
        if not rows and not chunks:
            self._run = None
            return
        held = self.kv_held - sum(r.prompt_tokens - left for r, left in self._prefill.items())
        seconds = self._profile.step_seconds(rows, held) if rows else 0.0
        seconds += sum(tokens for _, tokens in chunks) / self._profile.prefill_rate
        seconds = max(seconds, self._profile.step_seconds(1, 0))
        steps = 1 if chunks else min(self._decoding[0][0] - self._steps, MAX_STEPS_AT_ONCE)
        self._start(_Run(self._clock.now, seconds, steps, chunks))

    def _end(self, run: _Run) -> None:
        """Count the steps, hand over first tokens and ends; stale if an arrival cut the run."""
        if run is not self._run:
            return
        self._steps += run.steps
        self.kv_held += len(self._decoding) * run.steps
        for request, tokens in run.chunks:
            self.kv_held += tokens
            self._prefill[request] -= tokens
            if not self._prefill[request]:
                del self._prefill[request]
                request.first_token = self._clock.now
                self._on_token(request)
                self._admitted += 1
                last = self._steps + request.completion_tokens - 1
                heapq.heappush(self._decoding, (last, self._admitted, request))
        while self._decoding and self._decoding[0][0] <= self._steps:
            request = heapq.heappop(self._decoding)[2]
            self.kv_held -= request.prompt_tokens + request.completion_tokens - 1
            request.finished = self._clock.now
            self._on_token(request)
        self._begin()
