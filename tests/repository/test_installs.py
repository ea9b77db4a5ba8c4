"""Each extra in an environment of its own: what it must bring, and what it must not.

Slow, because it installs. Torch is left out where the extra does not name it; the engine's extra
takes the pinned version first, as the Makefile does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMPORTS = {
    "": ["nanoinfer", "nanoinfer.v1.gateway_pb2_grpc"],
    "cli": ["nanoinfer.cli", "typer", "rich"],
    "tokenizer": ["nanoinfer_tokenizer.service", "tiktoken", "jinja2"],
    "gateway": ["nanoinfer_gateway.service"],
    "engine": ["nanoinfer_engine.server.service", "torch", "safetensors"],
}
ABSENT = {
    "": ["torch", "tiktoken", "typer", "prometheus_client"],
    "cli": ["torch", "tiktoken", "jinja2"],
    "tokenizer": ["torch", "typer"],
    "gateway": ["torch", "tiktoken", "tokenizers", "jinja2"],
    "engine": ["tiktoken", "tokenizers", "transformers"],
}


def pinned(package: str) -> str:
    text = (ROOT / "constraints.txt").read_text()
    found = re.search(rf"^{package}==(.+)$", text, re.MULTILINE)
    assert found, package
    return found[1]


class Environment:
    """A fresh virtual environment."""

    def __init__(self, path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
        self._python = path / "bin" / "python"

    def install(self, *arguments: str) -> None:
        command = [str(self._python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._python), "-W", "error", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("extra", IMPORTS)
def test_an_extra_brings_what_it_serves_and_no_more(extra: str, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    if extra == "engine":
        environment.install(f"torch=={pinned('torch')}")
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    environment.install("-c", str(ROOT / "constraints.txt"), target)
    for module in IMPORTS[extra]:
        result = environment.run(f"import {module}")
        assert result.returncode == 0, result.stderr
    for module in ABSENT[extra]:
        result = environment.run(f"import {module}")
        assert "ModuleNotFoundError" in result.stderr, module


def test_the_client_runs_at_its_floor(tmp_path: Path) -> None:
    """The oldest versions that pyproject.toml admits load the stubs."""
    environment = Environment(tmp_path / "venv")
    environment.install(str(ROOT), "protobuf==6.33.5", "grpcio==1.81.0")
    code = (
        "import google.protobuf, nanoinfer; from nanoinfer import Client;"
        "from nanoinfer.v1 import engine_pb2_grpc, gateway_pb2, tokenizer_pb2_grpc;"
        "m = gateway_pb2.GatewayServiceGenerateRequest(text='x');"
        "assert gateway_pb2.GatewayServiceGenerateRequest.FromString(m.SerializeToString()) == m;"
        "print(google.protobuf.__version__)"
    )
    result = environment.run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "6.33.5"
