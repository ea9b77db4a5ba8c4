"""The event model against queueing theory, which was not written here."""

from __future__ import annotations

import math
import random
from functools import partial
from statistics import mean

import pytest

from benchmarks.scale.queues import Clock, Engine, Profile, Request, Station, Workload
from benchmarks.scale.simulation import Installation, Simulation, outcome

CHAT = Workload(512, 256)
SERVICES = {"gateway": 60, "tokenizer": 4, "engine": 4}


def waits(station: Station, rate: float, draw: partial[float], count: int = 200_000) -> float:
    """Mean time in the queue of Poisson arrivals, the first tenth left out."""
    generator = random.Random(7)
    now, found = 0.0, []
    for _ in range(count):
        now += generator.expovariate(rate)
        work = draw(generator)
        found.append(station.serve(now, work) - now - work)
    return mean(found[count // 10 :])


@pytest.mark.parametrize("utilisation", [0.3, 0.7, 0.85])
def test_exponential_service_waits_as_m_m_1(utilisation: float) -> None:
    found = waits(Station(), utilisation, partial(random.Random.expovariate, lambd=1.0))
    assert found == pytest.approx(utilisation / (1 - utilisation), rel=0.08)


@pytest.mark.parametrize("utilisation", [0.3, 0.7, 0.85])
def test_constant_service_waits_as_m_d_1(utilisation: float) -> None:
    found = waits(Station(), utilisation, partial(lambda _: 1.0))
    assert found == pytest.approx(utilisation / (2 * (1 - utilisation)), rel=0.06)


@pytest.mark.parametrize("servers", [2, 4])
def test_several_servers_wait_as_erlang_c(servers: int) -> None:
    offered = 0.75 * servers
    last = offered**servers / math.factorial(servers) / (1 - 0.75)
    queued = last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)
    found = waits(Station(servers), offered, partial(random.Random.expovariate, lambd=1.0))
    assert found == pytest.approx(queued / (servers - offered), rel=0.08)


def test_background_work_slows_a_station_down() -> None:
    station = Station()
    station.background = 0.75
    assert station.serve(2.0, 1.0) == 6.0


def served(profile: Profile, arrivals: list[float], work: Workload) -> list[Request]:
    """An engine alone under given arrivals."""
    clock, gateway = Clock(), Station()
    engine = Engine(profile, clock, lambda _: None)
    requests = [Request(t, work.prompt_tokens, work.completion_tokens, gateway) for t in arrivals]
    for request in requests:
        clock.at(request.arrived, partial(engine.submit, request))
    clock.run(math.inf)
    assert engine.running == 0
    assert engine.kv_held == pytest.approx(0)
    return requests


def time_to_first(request: Request) -> float:
    assert request.first_token is not None
    return request.first_token - request.arrived


def test_an_engine_with_one_row_is_m_d_1() -> None:
    profile, work = Profile("8b-h200", max_batch_requests=1), Workload(512, 32, 0)
    (alone,) = served(profile, [0.0], work)
    assert alone.finished is not None
    service, generator, now, arrivals = alone.finished, random.Random(3), 0.0, []
    for _ in range(30_000):
        now += generator.expovariate(0.7 / service)
        arrivals.append(now)
    queued = mean(time_to_first(r) for r in served(profile, arrivals, work)) - time_to_first(alone)
    assert queued == pytest.approx(0.7 * service / (2 * 0.3), rel=0.06)


def test_a_request_alone_takes_its_prefill_and_its_steps() -> None:
    profile, work = Profile("8b-h200"), Workload(4096, 3, 0)
    (request,) = served(profile, [1.0], work)
    assert time_to_first(request) == pytest.approx(4096 / 44_428)
    assert request.finished is not None
    assert request.first_token is not None
    # 131,072 bytes of KV a token at 4.37 TB/s, beyond the 640 tokens that 4.888 ms include
    steps = 2 * (4.888e-3 + (4096 - 640) * 131_072 / 4.37e12)
    assert request.finished - request.first_token == pytest.approx(steps, rel=1e-3)


def test_an_arrival_is_seen_at_the_next_step_not_after_a_run_of_them() -> None:
    profile, work = Profile("8b-h200"), Workload(512, 60, 0)
    first, second = served(profile, [0.0, 0.1], work)
    assert first.finished is not None
    assert first.finished > 0.2
    step = 4.888e-3
    assert 512 / 44_428 < time_to_first(second) < 512 / 44_428 + 2 * step


def test_full_batches_reach_the_calibrated_rate() -> None:
    """64 streams that only decode: the table's 6.598 ms a step at its own context."""
    profile = Profile("8b-h200")
    requests = served(profile, [0.0] * 64, Workload(512, 257, 0))
    starts = max(r.first_token for r in requests if r.first_token is not None)
    ends = min(r.finished for r in requests if r.finished is not None)
    num_steps = 256 - (starts - min(r.first_token or 0 for r in requests)) // 0.05
    assert (ends - starts) / num_steps == pytest.approx(6.598e-3, rel=0.03)


def test_littles_law_holds_for_the_whole_installation() -> None:
    simulation = Simulation(Installation(Profile("8b-h200"), CHAT, SERVICES))
    seen: list[int] = []

    def look() -> None:
        seen.append(sum(gateway.in_flight for gateway in simulation.gateways.ready))
        simulation.clock.at(simulation.clock.now + 0.25, look)

    simulation.clock.at(20, look)
    simulation.run(lambda _: 80.0, 80, 120)
    done = [r for r in simulation.requests if r.finished is not None and r.arrived > 20]
    stay = mean(r.finished - r.arrived for r in done if r.finished is not None)
    rate = sum(r.arrived > 20 for r in simulation.requests) / 100
    assert mean(seen) == pytest.approx(rate * stay, rel=0.03)


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    runs = []
    for seed in (1, 1, 2):
        simulation = Simulation(Installation(Profile("8b-h200"), CHAT, SERVICES, seed=seed))
        simulation.run(lambda _: 60.0, 60, 20)
        runs.append([r.first_token for r in simulation.requests])
    assert runs[0] == runs[1] != runs[2]


def test_more_engines_never_make_users_wait_longer() -> None:
    found = []
    for engines in (2, 3, 4, 6):
        services = {"gateway": 60, "tokenizer": 4, "engine": engines}
        simulation = Simulation(Installation(Profile("8b-h200"), CHAT, services))
        simulation.run(lambda _: 80.0, 80, 60)
        found.append(outcome(simulation, 1.0).over)
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.5
    assert found[-1] == 0


def test_a_workload_that_would_be_preempted_is_refused() -> None:
    with pytest.raises(ValueError, match="preemption"):
        Simulation(Installation(Profile("8b-h200"), Workload(8192, 1024), SERVICES))
