"""The plan is monotonic, and docs/scaling.md shows what the program prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nanoinfer_gateway.settings import GatewaySettings

from benchmarks.scale import __main__ as scale
from benchmarks.scale.queues import Profile, Workload, calibration
from benchmarks.scale.simulation import (
    CONNECTION_AGE,
    CPU_REQUEST,
    GATEWAY_MAX_REQUESTS,
    SCRAPE_SECONDS,
    Installation,
    Simulation,
    outcome,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
K8S = Path(__file__).parents[2] / "deploy" / "k8s"


@given(st.floats(0.1, 1e5), st.floats(1, 10))
def test_more_requests_never_need_less(rate: float, factor: float) -> None:
    profile = Profile("8b-h200")
    few, many = (scale.plan(profile, scale.CHAT, r) for r in (rate, rate * factor))
    assert all(few[name] <= many[name] for name in few)


@given(st.integers(16, 4096), st.integers(2, 2048), st.integers(1, 512))
def test_longer_requests_never_need_less(prompt: int, completion: int, more: int) -> None:
    profile = Profile("8b-h200")
    base = scale.plan(profile, Workload(prompt, completion), 1000)
    for longer in (Workload(prompt + more, completion), Workload(prompt, completion + more)):
        needed = scale.plan(profile, longer, 1000)
        assert all(base[name] <= needed[name] for name in scale.SERVICES)


def test_the_plan_of_one_rate_by_hand() -> None:
    """1,000 requests/s of 512 → 256 on 8B: 48 streams an engine at its mean context of 640."""
    step = (5.783 + (48 - 32) / (64 - 32) * (6.598 - 5.783)) / 1e3
    each = 1 / (512 / 44_428 + 256 * step / 48)
    assert scale.plan(Profile("8b-h200"), scale.CHAT, 1000)["engine"] == -(-1000 // each)


def test_a_slower_start_makes_more_users_wait() -> None:
    found = []
    for start in (5.0, 60.0, 240.0):
        installed = Installation(
            Profile("8b-h200"), scale.LONG, scale.SMALL, "hpa", engine_start=start
        )
        simulation = Simulation(installed)
        simulation.run(lambda t: 15.0 if t >= 60 else 5.0, 15, 900)
        found.append(outcome(simulation, scale.OBJECTIVE).over)
    assert found[0] < found[1] < found[2]


def test_every_figure_of_the_calibration_says_where_it_is_from() -> None:
    for name, entry in calibration()["costs"].items():
        assert entry["value"] > 0, name
        assert entry["unit"], name
        assert entry["source"], name
    for name, engine in calibration()["engines"].items():
        steps = list(engine["step_ms"].values())
        assert steps == sorted(steps), name
        assert engine["source"], name
        assert ("measured by" in engine["source"]) == (name == "guide-cpu")


@pytest.mark.timeout(120)
def test_the_document_shows_what_the_program_prints() -> None:
    begin, end = scale.MARKS
    shown = DOCUMENT.read_text().partition(begin)[2].partition(end)[0].strip()
    assert shown == scale.report(2), (
        "docs/scaling.md is old: python -m benchmarks.scale --write docs/scaling.md"
    )


def test_the_model_runs_what_is_deployed() -> None:
    """Constants that the simulation takes from the manifests and from the services' settings."""
    for service in ("gateway", "tokenizer"):
        (container,) = deployment("base", service)["containers"]
        variables = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert container["resources"]["requests"]["cpu"] == f"{1000 * CPU_REQUEST:g}m"
        assert variables["NANOINFER_MAX_CONNECTION_AGE_SECONDS"] == f"{CONNECTION_AGE:g}"
        assert "NANOINFER_MAX_REQUESTS" not in variables
    assert GatewaySettings.model_fields["max_requests"].default == GATEWAY_MAX_REQUESTS
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
