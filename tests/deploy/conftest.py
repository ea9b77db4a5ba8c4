"""Renderings of the manifests and what the services really offer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import rendering
from tests.deploy.offered import generate_once, scrape_all
from tests.deploy.rendering import K8S, Rendering
from tests.e2e.conftest import GUIDE
from tests.e2e.stack import start_stack


@pytest.fixture(scope="session")
def build_command() -> list[str]:
    command = rendering.build_command()
    if command is None:
        pytest.skip("no kustomize here: deploy/tools.sh could not fetch it, nor is kubectl >= 1.27")
    return command


@pytest.fixture(scope="session")
def promtool() -> Path:
    found = rendering.find_tool("promtool")
    if found is None:
        pytest.skip("no promtool here: deploy/tools.sh could not fetch it")
    return found


@pytest.fixture(scope="session")
def overlays(build_command: list[str]) -> dict[str, Rendering]:
    """Base and the shipped overlays, by name."""
    folders = [K8S / "base", *sorted((K8S / "overlays").iterdir())]
    return {folder.name: rendering.build(build_command, folder) for folder in folders}


@pytest.fixture(scope="session")
def everything(
    build_command: list[str],
    overlays: dict[str, Rendering],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Rendering]:
    """The overlays and the telling combinations of components."""
    folder = tmp_path_factory.mktemp("combinations")
    chosen = rendering.telling_combinations()
    return [*overlays.values(), *rendering.build_combinations(build_command, folder, chosen)]


@pytest.fixture(scope="session")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What each running service answers on /metrics after one request, by service.

    `fresh-SERVICE` is what it answered before that request.
    """
    with start_stack(GUIDE, tmp_path_factory.mktemp("scraped")) as stack:
        fresh = {f"fresh-{name}": text for name, text in scrape_all(stack).items()}
        generate_once(stack)
        yield scrape_all(stack) | fresh
