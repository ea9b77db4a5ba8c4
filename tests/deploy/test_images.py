"""Dockerfiles and the compose file, read as text: what a build would only show later."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from nanoinfer_common.server import ABORT_SECONDS, CLOSE_SECONDS
from nanoinfer_common.telemetry import FLUSH_SECONDS

from tests.deploy.offered import settings_of
from tests.deploy.rendering import ROOT, SERVICES, Rendering, container, pod

DOCKERFILE = ROOT / "deploy" / "images" / "Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
PORTS = {"gateway": (50051, 9091), "tokenizer": (50052, 9092), "engine": (50053, 9093)}


def stages() -> dict[str, str]:
    """The Dockerfile's instructions by stage; comments and the lines before the first are gone."""
    text = DOCKERFILE.read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    parts = re.split(r"^FROM ", "\n".join(lines), flags=re.MULTILINE)[1:]
    found = {}
    for part in parts:
        head, _, body = part.partition("\n")
        base, _, name = head.partition(" AS ")
        found[name] = f"{base}\n{body}"
    return found


def chain(stage: str, service: str) -> dict[str, str]:
    """The stages that a build of `stage` for `service` ships, the last first."""
    found, whole = {}, stages()
    while stage in whole:
        found[stage] = whole[stage]
        base = whole[stage].partition("\n")[0]
        stage = service if base == "${SERVICE}" else base
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_the_image_runs_one_service_as_nobody(service: str) -> None:
    found = chain("service", service)
    assert list(found) == ["service", service, "runtime"]
    runtime = found["runtime"] + found[service]
    assert "USER 10001:10001" in runtime
    assert f'ENTRYPOINT ["python", "-m", "nanoinfer_{service}"]' in runtime
    grpc_port, metrics_port = PORTS[service]
    assert f"EXPOSE {grpc_port} {metrics_port}" in runtime
    assert "STOPSIGNAL SIGTERM" in runtime
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in runtime
    assert "ENTRYPOINT" not in found["runtime"]


def test_only_the_service_s_own_extra_is_installed() -> None:
    found = stages()
    declared = "ARG SERVICE\n"
    assert declared in DOCKERFILE.read_text().partition("FROM")[0]  # without a default
    assert '".[$SERVICE]"' in found["build"].partition(declared)[2]
    (torch,) = (run for run in found["build"].split("\nRUN ") if " torch" in run)
    assert torch.startswith('if [ "$SERVICE" = engine ]; then')
    for name, body in found.items():
        # Nothing is installed in a stage that ships; what it holds comes from the build stage.
        if name != "build":
            assert "RUN" not in body
            assert "apt" not in body
    assert "-c constraints.txt" in found["build"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_default_stage_carries_no_model(service: str) -> None:
    last = list(stages())[-1]
    assert last == "service"
    assert not any("models" in body for body in chain(last, service).values())
    found = chain("guide", service)
    assert list(found) == ["guide", service, "runtime"]
    assert "COPY models/guide /models/model" in found["guide"]


def test_the_user_is_the_manifests(overlays: dict[str, Rendering]) -> None:
    for name, deployment in overlays["cpu"].services():
        context = pod(deployment)["securityContext"]
        user = f"USER {context['runAsUser']}:{context['runAsGroup']}"
        assert user in chain("service", name)["runtime"]
        assert container(deployment)["image"].split(":")[0] == f"nanoinfer/{name}"


def test_the_context_lets_in_what_the_builds_copy() -> None:
    """An allow-list: each source of a COPY is on it, and each entry exists."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = [line[1:] for line in lines if line.startswith("!")]
    for entry in allowed:
        assert (ROOT / entry).exists(), entry
    for body in stages().values():
        for match in re.finditer(r"^COPY (?!--from)(.+) \S+$", body, flags=re.MULTILINE):
            for source in match[1].split():
                assert any(entry.startswith(source) for entry in allowed), source


def test_the_demonstration_model_is_whole() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {Path(line[1:]).name for line in lines if line.startswith("!models/guide/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= allowed


@pytest.mark.parametrize("service", SERVICES)
def test_compose_gives_valid_settings(service: str) -> None:
    described = COMPOSE["services"][service]
    settings = settings_of(service, described["environment"])
    assert (settings.port, settings.metrics_port) == PORTS[service]
    needed = settings.drain_delay_seconds + settings.drain_seconds
    needed += ABORT_SECONDS + CLOSE_SECONDS + FLUSH_SECONDS
    assert float(described["stop_grace_period"].removesuffix("s")) > needed
    assert settings.trust_incoming_trace is (service != "gateway")
    assert described["read_only"] is True
    assert described["cap_drop"] == ["ALL"]
    build = described["build"]
    assert (ROOT / "deploy" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
    assert build["args"] == {"SERVICE": service}
    assert build.get("target", "service") in stages()


def test_compose_opens_the_gateway_to_this_machine_alone() -> None:
    for name, described in COMPOSE["services"].items():
        ports = described.get("ports", [])
        assert bool(ports) is (name == "gateway")
        assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_uses_the_images_of_the_cpu_overlay(overlays: dict[str, Rendering]) -> None:
    for name, deployment in overlays["cpu"].services():
        assert COMPOSE["services"][name]["image"] == container(deployment)["image"]
        environment: dict[str, str] = COMPOSE["services"][name]["environment"]
        if name == "gateway":
            targets = (environment["NANOINFER_TOKENIZER"], environment["NANOINFER_ENGINE"])
            assert targets == ("dns:///tokenizer:50052", "dns:///engine:50053")
