"""The scale model against queueing theory, hand calculation, and the manifests it stands for."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale import __main__ as scale
from benchmarks.scale.autoscaler import Settings
from benchmarks.scale.engines import Engine, Profile, Request, Workload, calibration
from benchmarks.scale.simulation import SCRAPE_SECONDS, Installation, Simulation, outcome

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
PROFILE = Profile("8b-h200")


def served(profile: Profile, arrivals: list[float], work: Workload) -> list[Request]:
    """An engine alone under given arrivals."""
    engine = Engine(profile)
    requests = [Request(t, work.prompt_tokens, work.completion_tokens) for t in arrivals]
    for request in requests:
        engine.submit(request)
    engine.advance(1e9)
    assert engine.in_flight == 0
    assert engine.kv_usage == 0
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
    (request,) = served(PROFILE, [1.0], Workload(4096, 3, 0))
    assert time_to_first(request) == pytest.approx(4096 / 44_428)
    assert request.finished is not None
    assert request.first_token is not None
    # 131,072 bytes of KV a token at 4.37 TB/s, beyond the 640 tokens that 4.888 ms include
    steps = 2 * (4.888e-3 + (4096 - 640) * 131_072 / 4.37e12)
    assert request.finished - request.first_token == pytest.approx(steps, rel=1e-3)


def test_an_arrival_is_seen_at_the_next_step_not_after_a_run_of_them() -> None:
    first, second = served(PROFILE, [0.0, 0.1], Workload(512, 60, 0))
    assert first.finished is not None
    assert first.finished > 0.2
    assert 512 / 44_428 < time_to_first(second) < 512 / 44_428 + 2 * 4.888e-3


def test_full_batches_reach_the_calibrated_rate() -> None:
    """64 streams that only decode: the table's 6.598 ms a step at its own context."""
    requests = served(PROFILE, [0.0] * 64, Workload(512, 257, 0))
    starts = max(r.first_token for r in requests if r.first_token is not None)
    ends = min(r.finished for r in requests if r.finished is not None)
    num_steps = 256 - (starts - min(r.first_token or 0 for r in requests)) // 0.05
    assert (ends - starts) / num_steps == pytest.approx(6.598e-3, rel=0.03)


def test_littles_law_gives_the_planned_streams_of_an_engine() -> None:
    rate = 4 * PROFILE.capacity(scale.CHAT, 40)
    simulation = Simulation(Installation(PROFILE, scale.CHAT, 4))
    simulation.run(lambda _: rate, rate, 120)
    done = [r for r in simulation.requests if 20 < r.arrived < 110 and r.finished is not None]
    stay = mean(r.finished - r.arrived for r in done if r.finished is not None)
    assert rate / 4 * stay == pytest.approx(40, rel=0.1)


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    runs = []
    for seed in (1, 1, 2):
        simulation = Simulation(Installation(PROFILE, scale.CHAT, 4, seed=seed))
        simulation.run(lambda _: 60.0, 60, 20)
        runs.append([r.first_token for r in simulation.requests])
    assert runs[0] == runs[1] != runs[2]


def test_more_engines_never_make_users_wait_longer() -> None:
    found = []
    for engines in (2, 3, 4, 6):
        simulation = Simulation(Installation(PROFILE, scale.CHAT, engines))
        simulation.run(lambda _: 80.0, 80, 60)
        found.append(outcome(simulation, 1.0).over)
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.5
    assert found[-1] == 0


def test_a_slower_start_makes_more_users_wait() -> None:
    found = []
    hpa = Installation(PROFILE, scale.LONG, 2, Settings.load("engine"))
    for start in (5.0, 60.0, 240.0):
        simulation = Simulation(replace(hpa, start_seconds=start))
        simulation.run(lambda t: 15.0 if t >= 60 else 5.0, 15, 900)
        found.append(outcome(simulation, scale.OBJECTIVE).over)
    assert found[0] < found[1] < found[2]


def test_a_workload_that_would_be_preempted_is_refused() -> None:
    with pytest.raises(ValueError, match="preemption"):
        Simulation(Installation(PROFILE, Workload(8192, 1024), 4))


@given(st.floats(0.1, 1e5), st.floats(1, 10))
def test_more_requests_never_need_fewer_replicas(rate: float, factor: float) -> None:
    few, many = (scale.plan(PROFILE, scale.CHAT, r) for r in (rate, rate * factor))
    assert all(few[name] <= many[name] for name in few)


@given(st.integers(16, 4096), st.integers(2, 2048), st.integers(1, 512))
def test_longer_requests_never_need_fewer_replicas(prompt: int, completion: int, more: int) -> None:
    base = scale.plan(PROFILE, Workload(prompt, completion), 1000)
    for longer in (Workload(prompt + more, completion), Workload(prompt, completion + more)):
        needed = scale.plan(PROFILE, longer, 1000)
        assert all(base[name] <= needed[name] for name in scale.SERVICES)


def test_the_plan_of_one_rate_by_hand() -> None:
    """1,000 requests/s of 512 → 256 on 8B: 48 streams an engine at its mean context of 640."""
    step = (5.783 + (48 - 32) / (64 - 32) * (6.598 - 5.783)) / 1e3
    each = 1 / (512 / 44_428 + 256 * step / 48)
    assert scale.plan(PROFILE, scale.CHAT, 1000)["engine"] == -(-1000 // each)


def test_every_figure_of_the_calibration_names_its_source() -> None:
    entries = {**calibration()["costs"], **calibration()["engines"]}
    assert {"gateway_request", "guide-cpu"} <= set(entries)
    assert all(entry["source"] for entry in entries.values())


def test_the_document_shows_what_the_program_prints() -> None:
    assert scale.report() in (ROOT / "docs" / "scaling.md").read_text(), (
        "docs/scaling.md is old: put the output of `make scale` in"
    )


def test_the_model_runs_what_is_deployed() -> None:
    for service in ("gateway", "tokenizer"):
        (container,) = deployment("base", service)["containers"]
        requested = container["resources"]["requests"]["cpu"]
        assert requested == f"{1000 * scale.CPU_REQUEST:g}m"
    monitors = (K8S / "components" / "prometheus-operator" / "pod-monitors.yaml").read_text()
    for monitor in yaml.safe_load_all(monitors):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["interval"] == f"{SCRAPE_SECONDS:g}s"
    (container,) = deployment("components/gpu", "engine")["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    for name in ("8b-h200", "0.6b-h200"):
        engine = calibration()["engines"][name]
        assert variables["NANOINFER_MAX_BATCH_REQUESTS"] == str(engine["max_batch_requests"])
        assert variables["NANOINFER_MAX_BATCH_TOKENS"] == str(engine["max_batch_tokens"])


def deployment(folder: str, service: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((K8S / folder / f"{service}.yaml").read_text())
    found: dict[str, Any] = next(d for d in documents if d["kind"] == "Deployment")
    spec: dict[str, Any] = found["spec"]["template"]["spec"]
    return spec
