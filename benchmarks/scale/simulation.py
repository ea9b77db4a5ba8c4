"""A whole installation under load: requests through the three tiers, autoscalers beside them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from nanoinfer_engine.core.config import EngineConfig

from benchmarks.scale.autoscaler import (
    SYNC_SECONDS,
    Autoscaler,
    Settings,
    external_proposal,
    pods_proposal,
)
from benchmarks.scale.queues import Clock, Engine, Profile, Request, Station, Workload, cost


class Member(Protocol):
    """What a tier asks of a replica."""

    @property
    def in_flight(self) -> int:
        """Requests here; a replica that drains is gone without any."""


Replica = TypeVar("Replica", bound=Member)

BYTES_PER_TOKEN = 4
# of a gateway's core; beyond it messages merge, so that new requests still get through
MAX_MESSAGE_SHARE = 0.95
# from deploy/k8s/base: CPU requested, age at which connections are sent away, and the default bound
CPU_REQUEST = 0.5
CONNECTION_AGE = 300.0
GATEWAY_MAX_REQUESTS = 512
# an engine's, in a second; streams that make more tokens get several in one
MAX_MESSAGES = EngineConfig.max_messages_per_second
# PodMonitor's interval (custom metrics) and metrics-server's resolution (CPU)
SCRAPE_SECONDS, CPU_SCRAPE_SECONDS = 10.0, 15.0
# the engines' load reports, and how a gateway picks by them
WATCH_SECONDS = 0.1
Pick = Literal["live", "reports", "two"]


@dataclass(frozen=True)
class Installation:
    """What is deployed. A service without an autoscaler keeps its number of replicas."""

    profile: Profile
    work: Workload
    replicas: dict[str, int]
    scaler: Literal["none", "hpa", "keda"] = "none"
    settings: dict[str, Settings] | None = None
    engine_start: float | None = None
    pick: Pick = "reports"
    seed: int = 1


class Tier(Generic[Replica]):
    """The replicas of one service: starting, ready, draining; all of them cost."""

    def __init__(
        self, clock: Clock, make: Callable[[], Replica], count: int, start_seconds: float
    ) -> None:
        self._clock, self._make, self._start_seconds = clock, make, start_seconds
        self.ready = [make() for _ in range(count)]
        self.draining: list[Replica] = []
        self._start_times: list[float] = []
        self.replica_seconds = 0.0
        self.sizes = [count]

    @property
    def starting(self) -> int:
        """Replicas that are not ready yet."""
        return len(self._start_times)

    @property
    def size(self) -> int:
        """Replicas that the Deployment asks for."""
        return len(self.ready) + self.starting

    def scale_to(self, count: int) -> None:
        """Start replicas, or take away: those that start first, then the youngest."""
        while self.size < count:
            end = self._clock.now + self._start_seconds
            self._start_times.append(end)
            self._clock.at(end, partial(self._finish_start, end))
        while self.size > count:
            if self._start_times:
                self._start_times.pop()
            else:
                self.draining.append(self.ready.pop())
        self.sizes.append(count)

    def _finish_start(self, end: float) -> None:
        if end in self._start_times:
            self._start_times.remove(end)
            self.ready.append(self._make())

    def pay(self, seconds: float) -> None:
        """Count the cost of a span of time."""
        self.draining = [replica for replica in self.draining if replica.in_flight]
        self.replica_seconds += seconds * (self.size + len(self.draining))


class Simulation:
    """Requests arrive by a Poisson process of any rate, or one for each that ends."""

    def __init__(self, installed: Installation) -> None:
        self.installed, self.clock = installed, Clock()
        self._random = random.Random(installed.seed)
        count, profile = installed.replicas, installed.profile
        # services start as the demonstration stack does, and are found ready at the next probe
        quick = Profile("guide-cpu").start_seconds + 5
        start = installed.engine_start or profile.start_seconds + 5
        self.gateways = Tier(self.clock, self._make_station, count["gateway"], quick)
        self.tokenizers = Tier(self.clock, self._make_station, count["tokenizer"], quick)
        self.engines = Tier(
            self.clock, lambda: Engine(profile, self.clock, self._on_token), count["engine"], start
        )
        self.requests: list[Request] = []
        self._stream_rate = 1 / profile.step_seconds(1, 0)
        self._closed_left = 0
        self._signals: dict[str, dict[str, list[float]]] = {"gateway": {}, "tokenizer": {}}
        work = installed.work
        if work.max_tokens * profile.max_batch > profile.kv_tokens:
            raise ValueError("the KV cache may run out, and preemption is not modelled")
        self._costs = {
            name: cost(name) for name in ("gateway_request", "gateway_message", "load_report")
        }
        text = work.prompt_tokens * BYTES_PER_TOKEN * cost("tokenizer_byte")
        self._encode_seconds = cost("tokenizer_request") + text

    def run(self, rate: Callable[[float], float], max_rate: float, seconds: float) -> None:
        """Open load: `rate(t)` requests a second, at most `max_rate`."""

        def arrive() -> None:
            self.clock.at(self.clock.now + self._random.expovariate(max_rate), arrive)
            if self._random.random() < rate(self.clock.now) / max_rate:
                self._arrive()

        arrive()
        self._scrape()
        self._scrape_cpu()
        if self.installed.scaler != "none":
            settings = self.installed.settings or {s: Settings.load(s) for s in self._tiers}
            scalers = {service: Autoscaler(settings[service]) for service in settings}
            # a phase of its own, so that figures are between 2 and 10 seconds old
            self.clock.at(7.0, partial(self._synchronise, scalers))
        self.clock.run(seconds)

    def run_closed(self, concurrency: int, num_requests: int) -> None:
        """Closed load: so many clients, each sends its next request when the last one ended."""
        self._closed_left = num_requests - concurrency
        for _ in range(concurrency):
            self._arrive()
        self.clock.run(float("inf"))

    @property
    def _tiers(self) -> dict[str, Tier[Station] | Tier[Engine]]:
        return {"gateway": self.gateways, "tokenizer": self.tokenizers, "engine": self.engines}

    def _make_station(self) -> Station:
        """At time 0 all connections are old and spread evenly."""
        station = Station(born=self.clock.now or float("-inf"))
        station.phase = self._random.random() * WATCH_SECONDS
        return station

    def _arrive(self) -> None:
        work, now = self.installed.work, self.clock.now
        spread = 1 + work.spread * (2 * self._random.random() - 1)
        tokens = max(1, round(work.completion_tokens * spread))
        gateway = self._station(self.gateways)
        request = Request(now, work.prompt_tokens, tokens, gateway)
        self.requests.append(request)
        if gateway.in_flight >= GATEWAY_MAX_REQUESTS:
            return
        gateway.in_flight += 1
        gateway.background = self._message_share(gateway)
        done = gateway.serve(now, self._costs["gateway_request"])
        self.clock.at(done, partial(self._encode, request, gateway))

    def _encode(self, request: Request, gateway: Station) -> None:
        tokenizer = self._station(self.tokenizers)
        tokenizer.in_flight += 1

        def submit() -> None:
            tokenizer.in_flight -= 1
            engine = self._pick(gateway)
            if len(engine.waiting) < self.installed.profile.max_waiting:
                engine.submit(request)
            else:
                gateway.in_flight -= 1

        self.clock.at(tokenizer.serve(self.clock.now, self._encode_seconds), submit)

    def _on_token(self, request: Request) -> None:
        """The first token came, or the last."""
        if request.finished is None or request.first_token is None:
            return
        request.gateway.in_flight -= 1
        if request.completion_tokens > 1:
            rate = (request.completion_tokens - 1) / (request.finished - request.first_token)
            engines = self.engines.ready
            running = sum(engine.running for engine in engines)
            rate = min(rate, MAX_MESSAGES * len(engines) / max(running, 1))
            self._stream_rate += 0.02 * (rate - self._stream_rate)
        if self._closed_left > 0:
            self._closed_left -= 1
            self._arrive()

    def _station(self, tier: Tier[Station]) -> Station:
        """Any ready one; a new one gets its part only as old connections reach their age."""
        while True:
            station = tier.ready[int(self._random.random() * len(tier.ready))]
            age = self.clock.now - station.born
            if age >= CONNECTION_AGE or self._random.random() < age / CONNECTION_AGE:
                return station

    def _pick(self, gateway: Station) -> Engine:
        """The least loaded engine, as this gateway sees it; any of equals.

        Reports of one engine reach different gateways at different moments. What a gateway itself
        has there is left out: gateways are many, so that it is less than what was reported.
        """
        engines, pick = self.engines.ready, self.installed.pick
        now, count = self.clock.now, len(engines)
        turn = int(self._random.random() * count)
        if pick == "live":
            return min(engines[turn:] + engines[:turn], key=lambda engine: engine.load)
        if pick == "two" and count > 1:
            other = (turn + 1 + int(self._random.random() * (count - 1))) % count
            engines = [engines[turn], engines[other]]
        ages = {
            e: (now + gateway.phase + n * 0.0173) % WATCH_SECONDS for n, e in enumerate(engines)
        }
        return min(engines, key=lambda engine: engine.load_at(now - ages[engine]))

    def _message_share(self, gateway: Station) -> float:
        """Share of a gateway's core that messages and load reports take."""
        share = gateway.in_flight * self._stream_rate * self._costs["gateway_message"]
        reports = len(self.engines.ready) / WATCH_SECONDS * self._costs["load_report"]
        return min(share + reports, MAX_MESSAGE_SHARE)

    def _scrape(self) -> None:
        for name, tier in self._tiers.items():
            tier.pay(SCRAPE_SECONDS)
            if name != "engine":
                self._signals[name]["inflight"] = [float(r.in_flight) for r in tier.ready]
        engines = self.engines.ready
        self._signals["engine"] = {
            "waiting": [float(len(engine.waiting)) for engine in engines],
            "running": [float(engine.running) for engine in engines],
            "kv_cache_usage": [engine.kv_usage for engine in engines],
        }
        self.clock.at(self.clock.now + SCRAPE_SECONDS, self._scrape)

    def _scrape_cpu(self) -> None:
        for name, tier in (("gateway", self.gateways), ("tokenizer", self.tokenizers)):
            used = []
            for station in tier.ready:
                share = self._message_share(station) if name == "gateway" else 0.0
                used.append(min(station.busy / CPU_SCRAPE_SECONDS + share, 1) / CPU_REQUEST)
                station.busy = 0.0
            self._signals[name]["cpu"] = used
        self.clock.at(self.clock.now + CPU_SCRAPE_SECONDS, self._scrape_cpu)

    def _synchronise(self, scalers: dict[str, Autoscaler]) -> None:
        for service, scaler in scalers.items():
            tier, proposals = self._tiers[service], []
            for metric, target in scaler.settings.targets.items():
                values = self._signals[service][metric][: len(tier.ready)]
                if self.installed.scaler == "keda" and metric != "cpu":
                    proposals.append(external_proposal(sum(values), tier.size, target))
                else:
                    proposals.append(pods_proposal(values, tier.size - len(values), target))
            count = scaler.decide(self.clock.now, tier.size, proposals)
            if count != tier.size:
                tier.scale_to(count)
        self.clock.at(self.clock.now + SYNC_SECONDS, partial(self._synchronise, scalers))


@dataclass(frozen=True)
class Outcome:
    """What the users saw. Refused requests count as over every objective."""

    num_requests: int
    refused: float
    over: float
    p50: float
    p99: float
    recovered: float


def outcome(
    simulation: Simulation, objective: float, since: float = 0.0, step_at: float | None = None
) -> Outcome:
    """Judge the requests that arrived from `since` on; the last ones under way are left out.

    `recovered`: seconds from `step_at` to the end of the last half minute in which more than 1 %
    of the requests took longer than the objective.
    """
    end = simulation.clock.now - 10 * objective
    judged = [r for r in simulation.requests if since <= r.arrived < end]
    arrived = np.array([r.arrived for r in judged])
    waits = np.array(
        [np.inf if r.first_token is None else r.first_token - r.arrived for r in judged]
    )
    late, recovered = waits > objective, 0.0
    if step_at is not None:
        bins = ((arrived - step_at) // 30).astype(int)
        for number in range(bins.max() + 1):
            if late[bins == number].mean() > 0.01:
                recovered = (number + 1) * 30.0
    finite = waits[np.isfinite(waits)]
    p50, p99 = np.quantile(finite, [0.5, 0.99])
    refused = 1 - len(finite) / len(waits)
    return Outcome(len(waits), refused, float(late.mean()), float(p50), float(p99), recovered)
