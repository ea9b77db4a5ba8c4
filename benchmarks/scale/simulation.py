"""Engines and their autoscaler under Poisson load, with no other service in the way.

Not modelled: gateways, tokenizers, the network, prefix reuse, failures, preemption (a load that may
need it is refused).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.scale.autoscaler import SYNC_SECONDS, Autoscaler, Settings, proposal
from benchmarks.scale.engines import MAX_WAITING, Engine, Profile, Request, Workload

SCRAPE_SECONDS = 10
PROBE_SECONDS = 5


@dataclass(frozen=True)
class Installation:
    """The engines deployed at first; without `settings` their number stays."""

    profile: Profile
    work: Workload
    engines: int
    settings: Settings | None = None
    start_seconds: float | None = None
    seed: int = 1


class Simulation:
    """One run; `requests`, `sizes` and `engine_seconds` hold what happened."""

    def __init__(self, installed: Installation) -> None:
        work, profile = installed.work, installed.profile
        if work.max_tokens * profile.max_batch > profile.kv_tokens:
            raise ValueError("the KV cache may run out, and preemption is not modelled")
        self._work, self._profile = work, profile
        self._random = random.Random(installed.seed)
        self._scaler = Autoscaler(installed.settings) if installed.settings else None
        self._start_seconds = (installed.start_seconds or profile.start_seconds) + PROBE_SECONDS
        self._ready = [Engine(profile) for _ in range(installed.engines)]
        self._draining: list[Engine] = []
        self._starts: list[float] = []
        self._signals: dict[str, list[float]] = {}
        self.requests: list[Request] = []
        self.sizes = [installed.engines]
        self.engine_seconds = 0
        self.now = 0

    def run(self, rate: Callable[[float], float], max_rate: float, seconds: int) -> None:
        """Let `rate(t)` requests a second arrive, at most `max_rate`."""
        arrival = self._random.expovariate(max_rate)
        for self.now in range(seconds):
            started = [start for start in self._starts if start <= self.now]
            self._starts = self._starts[len(started) :]
            self._ready += [Engine(self._profile) for _ in started]
            self.engine_seconds += len(self._ready) + len(self._starts) + len(self._draining)
            if self.now % SCRAPE_SECONDS == 0:
                self._scrape()
            # a phase of its own, so that figures are between 2 and 10 seconds old
            if self._scaler and self.now % SYNC_SECONDS == 7:
                self._synchronise(self._scaler)
            while arrival < self.now + 1:
                if self._random.random() < rate(arrival) / max_rate:
                    self._arrive(arrival)
                arrival += self._random.expovariate(max_rate)
        self._scrape()

    def _arrive(self, time: float) -> None:
        """Send a request to the better of two engines, as gateways do; a full queue refuses it."""
        work = self._work
        spread = 1 + work.spread * (2 * self._random.random() - 1)
        tokens = max(1, round(work.completion_tokens * spread))
        request = Request(time, work.prompt_tokens, tokens)
        self.requests.append(request)
        drawn = self._random.sample(self._ready, min(2, len(self._ready)))
        for engine in drawn:
            engine.advance(time)
        chosen = min(drawn, key=lambda engine: engine.load)
        if len(chosen.waiting) < MAX_WAITING:
            chosen.submit(request)

    def _scrape(self) -> None:
        for engine in self._ready + self._draining:
            engine.advance(self.now)
        self._draining = [engine for engine in self._draining if engine.in_flight]
        self._signals = {
            "waiting": [float(len(engine.waiting)) for engine in self._ready],
            "running": [float(engine.running) for engine in self._ready],
            "kv_cache_usage": [engine.kv_usage for engine in self._ready],
        }

    def _synchronise(self, scaler: Autoscaler) -> None:
        size = len(self._ready) + len(self._starts)
        proposals = []
        for metric, target in scaler.settings.targets.items():
            values = self._signals[metric][: len(self._ready)]
            proposals.append(proposal(values, size - len(values), target))
        count = scaler.decide(self.now, size, proposals)
        if count == size:
            return
        self.sizes.append(count)
        self._starts += [self.now + self._start_seconds] * (count - size)
        for _ in range(size - count):  # those that start first, then the youngest
            if self._starts:
                self._starts.pop()
            else:
                self._draining.append(self._ready.pop())


class Outcome(NamedTuple):
    """The users' view. Refused requests count as over the objective."""

    refused: float
    over: float
    p99: float
    last_bad: float
    """End of the last half minute in which more than 1 % were over the objective."""


def outcome(simulation: Simulation, objective: float) -> Outcome:
    """Judge all requests but the last under way."""
    judged = [r for r in simulation.requests if r.arrived < simulation.now - 10 * objective]
    waits = np.array([(r.first_token or np.inf) - r.arrived for r in judged])
    late = waits > objective
    bins = (np.array([r.arrived for r in judged]) // 30).astype(int)
    bad = [30.0 * (each + 1) for each in np.unique(bins) if late[bins == each].mean() > 0.01]
    served = waits[np.isfinite(waits)]
    refused, p99 = 1 - len(served) / len(waits), float(np.quantile(served, 0.99))
    return Outcome(refused, float(late.mean()), p99, max(bad, default=0.0))
