"""Builds the manifests with kustomize: base, overlays, and every combination of components."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"
TOOLS = ROOT / ".cache" / "tools"
SERVICES = ("gateway", "tokenizer", "engine")

# Of each of these at most one; of the others any.
AUTOSCALERS = (None, "hpa", "keda")
MODEL_VOLUMES = (None, "model-volume-image", "model-volume-pvc", "model-volume-init")
SWITCHES = ("prometheus-operator", "otel-collector", "network-policies", "gateway-api", "gpu")

Document = dict[str, Any]


@dataclass(frozen=True)
class Rendering:
    """What one `kustomize build` gave."""

    name: str
    documents: tuple[Document, ...]

    def of(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    def get(self, kind: str, name: str) -> Document:
        found = [d for d in self.of(kind) if d["metadata"]["name"] == name]
        assert len(found) == 1, f"{self.name}: {len(found)} of {kind} {name}"
        return found[0]

    def names(self, kind: str) -> set[str]:
        return {document["metadata"]["name"] for document in self.of(kind)}

    def services(self) -> Iterator[tuple[str, Document]]:
        """The three Deployments of our own."""
        for name in SERVICES:
            yield name, self.get("Deployment", name)


def find_tool(name: str) -> Path | None:
    """A fetched program, or the one on PATH; fetches it where that works."""
    fetched = TOOLS / name
    if fetched.exists():
        return fetched
    if (found := shutil.which(name)) is not None:
        return Path(found)
    subprocess.run(
        [ROOT / "deploy" / "tools.sh"], check=False, capture_output=True, timeout=150, cwd=ROOT
    )
    return fetched if fetched.exists() else None


def build_command() -> list[str] | None:
    """The command that builds a folder; None where there is no kustomize that knows components."""
    if (kustomize := find_tool("kustomize")) is not None:
        return [str(kustomize), "build"]
    if (kubectl := shutil.which("kubectl")) is not None:
        version = subprocess.run(
            [kubectl, "version", "--client"], check=False, capture_output=True, text=True
        )
        match = re.search(r"v1\.(\d+)\.", version.stdout)
        if match and int(match[1]) >= 27:
            return [kubectl, "kustomize"]
    return None


def build(command: Sequence[str], folder: Path) -> Rendering:
    """Builds a folder; a warning of kustomize's counts as a failure."""
    result = subprocess.run(
        [*command, str(folder)], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, f"{folder}: {result.stderr}"
    assert not result.stderr, f"{folder}: {result.stderr}"
    texts = result.stdout.split("\n---\n")
    return Rendering(folder.name, tuple(_parse(text) for text in texts))


def all_combinations() -> Iterator[tuple[str, ...]]:
    """Every offered choice of components."""
    subsets = [
        chosen
        for size in range(len(SWITCHES) + 1)
        for chosen in itertools.combinations(SWITCHES, size)
    ]
    for autoscaler, volume, chosen in itertools.product(AUTOSCALERS, MODEL_VOLUMES, subsets):
        yield _choice(autoscaler, volume, chosen)


def telling_combinations() -> Iterator[tuple[str, ...]]:
    """A tenth of them, in which every component meets every other one and stands without it."""
    for autoscaler, volume in itertools.product(AUTOSCALERS, MODEL_VOLUMES):
        yield _choice(autoscaler, volume, ())
        yield _choice(autoscaler, volume, SWITCHES)
    for size in (1, 2, 4):
        for chosen in itertools.combinations(SWITCHES, size):
            yield _choice(None, None, chosen)


def _choice(autoscaler: str | None, volume: str | None, chosen: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in (*chosen, volume, autoscaler) if name is not None)


def build_combinations(
    command: Sequence[str], folder: Path, combinations: Iterable[tuple[str, ...]]
) -> list[Rendering]:
    """Builds base with combinations of components, in throw-away overlays under `folder`."""
    shutil.copytree(K8S, folder / "k8s")
    folders = [_overlay(folder / "k8s" / "combinations", chosen) for chosen in combinations]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda path: build(command, path), folders))


def _overlay(parent: Path, components: Sequence[str]) -> Path:
    path = parent / ("+".join(components) or "base-alone")
    path.mkdir(parents=True)
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../base"],
        "components": [f"../../components/{name}" for name in components],
    }
    (path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return path


@cache
def _parse(text: str) -> Document:
    document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert isinstance(document, dict)
    return document


def pod(deployment: Document) -> Document:
    spec = deployment["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def container(deployment: Document) -> Document:
    """The one container that carries the Deployment's own name."""
    name = deployment["metadata"]["name"]
    found: list[Document] = [c for c in pod(deployment)["containers"] if c["name"] == name]
    assert len(found) == 1
    return found[0]


def environment(deployment: Document) -> dict[str, str]:
    """The main container's environment as the kubelet would set it."""
    values = {}
    for variable in container(deployment)["env"]:
        if "value" in variable:
            values[variable["name"]] = variable["value"]
            continue
        source = variable["valueFrom"]
        if "resourceFieldRef" in source:
            kind, resource = source["resourceFieldRef"]["resource"].split(".")
            assert resource == "cpu"
            values[variable["name"]] = str(math.ceil(cores(container(deployment), kind)))
        else:
            values[variable["name"]] = source["fieldRef"]["fieldPath"]
    return values


def cores(container_: Mapping[str, Any], kind: str) -> float:
    text = str(container_["resources"][kind]["cpu"])
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def memory_bytes(container_: Mapping[str, Any], kind: str) -> int:
    match = re.fullmatch(r"(\d+)(Mi|Gi)", container_["resources"][kind]["memory"])
    assert match
    return int(match[1]) * {"Mi": 2**20, "Gi": 2**30}[match[2]]
