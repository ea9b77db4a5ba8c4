"""Calls that are made and reset at once, by the thousand: cheap, and nobody else's business."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from nanoinfer.v1 import gateway_pb2 as pb

from tests.gateway.fakes import FakeEngine, FakeTokenizer, eventually, serving
from tests.gateway.processes import GatewayProcess, gateway_process
from tests.http2_frames import Connection

REQUEST = pb.GatewayServiceGenerateRequest(text="hi")
STREAM = pb.GatewayServiceGenerateStreamRequest(text="hi")
PATH = "/nanoinfer.v1.GatewayService/GenerateStream"
NUM_SERVED, NUM_BURSTS, NUM_IN_BURST = 200, 20, 100


def cpu_seconds(running: GatewayProcess) -> float:
    times = psutil.Process(running.pid).cpu_times()
    return float(times.user + times.system)


async def text_of(running: GatewayProcess) -> str:
    return str((await running.stub.Generate(REQUEST, timeout=60)).choices[0].text)


async def served_cost(running: GatewayProcess) -> float:
    """CPU seconds of a call that is answered."""
    for _ in range(20):
        await text_of(running)
    before = cpu_seconds(running)
    for _ in range(NUM_SERVED):
        await text_of(running)
    return (cpu_seconds(running) - before) / NUM_SERVED


@pytest.mark.matrix("R44")
@pytest.mark.parametrize("pause", [None, 0.005], ids=["at once", "a moment later"])
async def test_calls_that_are_reset_cost_no_more_than_calls_that_are_served(
    tmp_path: Path, pause: float | None
) -> None:
    engine = FakeEngine()
    async with (
        serving(FakeTokenizer()) as one,
        serving(engine) as two,
        gateway_process(one.address, two.address, tmp_path) as running,
    ):
        reference = await served_cost(running)
        attacker = await Connection.open(running.address)
        attacker.call(PATH, STREAM.SerializeToString())
        await eventually(lambda: attacker.num_data > 0, 60)  # its calls are calls

        before = cpu_seconds(running)
        texts: list[str] = []
        for _ in range(NUM_BURSTS):
            streams = []
            for _ in range(NUM_IN_BURST):
                streams.append(attacker.call(PATH, STREAM.SerializeToString()))
                if pause is None:
                    attacker.reset(streams[-1])
            if pause is not None:
                await asyncio.sleep(pause)
                for stream in streams:
                    attacker.reset(stream)
            texts += await asyncio.gather(*(text_of(running) for _ in range(2)))
            await asyncio.sleep(0.1)  # a thousand in a second, where the machine keeps up
        spent = cpu_seconds(running) - before - len(texts) * reference
        assert texts == ["Hello world"] * (2 * NUM_BURSTS)
        assert spent / (NUM_BURSTS * NUM_IN_BURST) < 2 * reference
        await eventually(lambda: engine.num_running == 0, 60)
        assert await text_of(running) == "Hello world"
        assert not attacker.goaway
        await attacker.close()
