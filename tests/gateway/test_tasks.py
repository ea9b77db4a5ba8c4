"""Background tasks of the gateway that meet what nobody expected: heard of, started again."""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import structlog
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2
from nanoinfer_gateway.upstreams import replicas

from tests.gateway.fakes import FakeEngine, FakeTokenizer, eventually, gateway, serving
from tests.gateway.processes import become, gateway_process

ROOT = Path(__file__).resolve().parents[2]
REQUEST = pb.GatewayServiceGenerateRequest(text="hi")
STALLED, SERVING = generation_pb2.SERVER_STATE_STALLED, generation_pb2.SERVER_STATE_SERVING
# they await what they start, or hand it to an owner that logs and starts it again
OWNERS = {
    "services/common/nanoinfer_common/tasks.py",
    "services/common/nanoinfer_common/sending.py",
    "services/common/nanoinfer_common/server.py",
    "services/engine/nanoinfer_engine/core/engine.py",
    "gateway/nanoinfer_gateway/core/generation.py",
    "gateway/nanoinfer_gateway/core/vocabulary.py",
}
# a service that meets no distribution of its name, as one that runs from a folder of sources
WITHOUT_DISTRIBUTION = """
import runpy, sys
from importlib import metadata

found = metadata.distribution

def distribution(name):
    if name == "nanoinfer":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.distribution = distribution
runpy.run_module("nanoinfer_gateway", run_name="__main__", alter_sys=True)
"""


async def test_a_watcher_that_fails_is_heard_of_and_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    offered = replicas._offered
    async with (
        serving(FakeTokenizer()) as one,
        serving(engine) as two,
        gateway([one.address], [two.address]) as running,
    ):

        def fail(model: Any) -> Any:
            raise ValueError("unexpected")

        monkeypatch.setattr(replicas, "_offered", fail)
        with structlog.testing.capture_logs() as lines:
            await two.kill()
            async with serving(engine, two.address):
                await eventually(
                    lambda: any(line["event"] == "background task failed" for line in lines), 60
                )
                assert running.server.status.state == STALLED
                monkeypatch.setattr(replicas, "_offered", offered)
                await eventually(lambda: running.server.status.state == SERVING, 60)
                assert (await running.stub.Generate(REQUEST)).choices[0].text == "Hello world"
        tasks = {line["task"] for line in lines if line["event"] == "background task failed"}
        assert tasks == {f"watch ipv4:{two.address}"}


async def test_a_look_up_that_fails_unexpectedly_shows_in_health(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = False

    async def resolve(given: Collection[str]) -> frozenset[str]:
        if broken:
            raise ValueError("unexpected")
        return frozenset(f"ipv4:{address}" for address in given)

    monkeypatch.setattr("nanoinfer_gateway.upstreams.addresses.resolve", resolve)
    async with (
        serving(FakeTokenizer()) as one,
        serving(FakeEngine()) as two,
        gateway([one.address], [two.address], resolve_seconds=0.05) as running,
    ):
        assert await become(running.channel, "SERVING")
        broken = True
        with structlog.testing.capture_logs() as lines:
            assert await become(running.channel, "NOT_SERVING")
            assert any(line["event"] == "background task failed" for line in lines)
            # what is known goes on
            assert (await running.stub.Generate(REQUEST)).choices[0].text == "Hello world"
            broken = False
            assert await become(running.channel, "SERVING")


async def test_a_gateway_without_an_installed_distribution_gets_ready(tmp_path: Path) -> None:
    program = ("-c", WITHOUT_DISTRIBUTION)
    async with (
        serving(FakeTokenizer()) as one,
        serving(FakeEngine()) as two,
        gateway_process(one.address, two.address, tmp_path, program=program) as running,
    ):
        info = await running.stub.GetServerInfo(pb.GatewayServiceGetServerInfoRequest())
        assert info.server.version == "unknown"
        assert (await running.stub.Generate(REQUEST)).choices[0].text == "Hello world"


def test_every_task_that_is_started_has_an_owner() -> None:
    found = set()
    for folder in ("services", "gateway"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = getattr(node, "func", None)
                if getattr(called, "attr", "") in ("create_task", "ensure_future"):
                    found.add(str(path.relative_to(ROOT)))
    assert found <= OWNERS
    assert "services/common/nanoinfer_common/tasks.py" in found
