"""A wall clock that jumps by an hour, both ways: timers, deadlines and signs of life go on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2

from tests.clocks import MovableClock
from tests.gateway.fakes import EngineResponse, delta, eventually, finish, serving, summary
from tests.gateway.processes import become, gateway_process, readiness
from tests.gateway.silent_fakes import BeatingEngine, BeatingTokenizer, serving_beating

HOUR = 3600
STREAM = pb.GatewayServiceGenerateStreamRequest(text="hi")
REQUEST = pb.GatewayServiceGenerateRequest(text="hi")


def hours(log: Path) -> set[int]:
    """How far the log's entries are from now, in hours."""
    now = datetime.now().astimezone()
    found = set()
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            written = datetime.fromisoformat(json.loads(line)["timestamp"].replace("Z", "+00:00"))
            found.add(round((written - now).total_seconds() / HOUR))
    return found


@pytest.mark.matrix("R75")
@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["ahead", "back"])
async def test_a_gateway_whose_clock_jumps_serves_on(tmp_path: Path, jump: int) -> None:
    clock = MovableClock(tmp_path)
    engine = BeatingEngine()
    go_on = asyncio.Event()

    async def tell(request: Any) -> AsyncIterator[EngineResponse]:
        yield EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=2))
        yield EngineResponse(deltas=[delta([ord("a")])])
        await go_on.wait()
        yield EngineResponse(deltas=[delta([ord("b")])])
        yield EngineResponse(finishes=[finish()], summary=summary(2, 3))

    engine.behaviour = tell
    async with (
        serving_beating(BeatingTokenizer()) as one,
        serving(engine) as two,
        gateway_process(
            one.address, two.address, tmp_path, environment=clock.environment
        ) as running,
    ):
        began = time.monotonic_ns()
        stream = running.stub.GenerateStream(STREAM, timeout=600)
        text = ""
        while text != "a":
            text += "".join(each.text for each in (await stream.read()).deltas)
        clock.move(jump)
        reports = engine.num_reports
        await eventually(lambda: engine.num_reports > reports + 10, 60)
        assert await readiness(running.channel) == "SERVING"
        with pytest.raises(grpc.aio.AioRpcError) as raised:  # deadlines still end calls
            await running.stub.Generate(REQUEST, timeout=1)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        go_on.set()
        while (message := await stream.read()) is not grpc.aio.EOF:
            text += "".join(each.text for each in message.deltas)
            last = message
        assert text == "ab"
        assert last.summary.timings.total_ns <= time.monotonic_ns() - began
        assert last.summary.timings.total_ns >= last.summary.timings.time_to_first_token_ns > 0
        engine.thawed.clear()
        assert await become(running.channel, "NOT_SERVING")  # silence is still found
        engine.thawed.set()
        assert await become(running.channel, "SERVING")
        answer = await running.stub.Generate(REQUEST, timeout=600)
        assert answer.choices[0].text == "ab"
    assert hours(tmp_path / "log") == {0, jump // HOUR}, "the clock was moved indeed"
