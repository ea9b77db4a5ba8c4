"""Engines that serve different weights under one name: said in the log and in a metric."""

from __future__ import annotations

import asyncio
import re
import urllib.request

import pytest
import structlog
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer_common.server import RunningServer

from tests.gateway.fakes import (
    FakeEngine,
    FakeTokenizer,
    gateway,
    model_info,
    serving,
)

REQUEST = pb.GatewayServiceGenerateRequest(text="hi")
SERVED = re.compile(
    r'^nanoinfer_gateway_engines_serving{model="fake",weights="(\w+)"} (\S+)$', re.M
)


async def served(server: RunningServer) -> dict[str, float]:
    """Engines by weights, as /metrics shows them."""
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"

    def scrape() -> str:
        with urllib.request.urlopen(url, timeout=60) as response:
            return str(response.read().decode())

    return {name: float(value) for name, value in SERVED.findall(await asyncio.to_thread(scrape))}


async def become(server: RunningServer, wanted: dict[str, float]) -> bool:
    """Waits until /metrics shows what is wanted."""
    async with asyncio.timeout(60):
        while await served(server) != wanted:
            await asyncio.sleep(0.02)
    return True


@pytest.mark.matrix("R80")
async def test_two_weights_of_one_name_are_logged_and_counted_and_both_are_used() -> None:
    engines = [
        FakeEngine(model=model_info(weights_fingerprint=bytes([number]) * 32))
        for number in (0xAA, 0xBB, 0xAA)
    ]
    warnings = "engines_differ_in_weights"
    with structlog.testing.capture_logs() as lines:
        async with (
            serving(FakeTokenizer()) as one,
            serving(engines[0]) as two,
            serving(engines[1]) as three,
            serving(engines[2]) as four,
            gateway(
                [one.address], [two.address, three.address, four.address], metrics_port=0
            ) as running,
        ):
            assert await become(running.server, {"aa" * 6: 2, "bb" * 6: 1})
            said = [line for line in lines if line["event"] == warnings]
            assert said[-1]["model"] == "fake"
            assert set(said[-1]["replicas"]) == {"aa" * 32, "bb" * 32}
            number = len(said)
            while not all(engine.requests for engine in engines):
                await running.stub.Generate(REQUEST)
            engines[1].report(admission_state=engine_pb2.ADMISSION_STATE_CLOSED)
            assert await become(running.server, {"aa" * 6: 2, "bb" * 6: 0})
            assert sum(line["event"] == warnings for line in lines) == number


async def test_one_weight_of_one_name_is_no_news() -> None:
    engines = [FakeEngine(model=model_info(weights_fingerprint=b"\x01" * 32)) for _ in range(2)]
    with structlog.testing.capture_logs() as lines:
        async with (
            serving(FakeTokenizer()) as one,
            serving(engines[0]) as two,
            serving(engines[1]) as three,
            gateway([one.address], [two.address, three.address], metrics_port=0) as running,
        ):
            assert await become(running.server, {"01" * 6: 2})
    assert not [line for line in lines if line["event"] == "engines_differ_in_weights"]
