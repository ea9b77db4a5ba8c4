"""Clients that take nothing or vanish: a status where there is somebody, and blocks given back."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import grpc
import pytest
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import generation_pb2 as pb

from tests.engine.control.conftest import Engine, StartFake
from tests.engine.fakes import FakeRunner
from tests.http2 import connect

LONG = 60.0  # ends a test that hangs; nothing is measured by it
GENERATE = "nanoinfer.v1.EngineService/Generate"
EXHAUSTED = str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
CLIENT = """
import sys
import grpc
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc
address, raw = sys.argv[1:]
stub = engine_pb2_grpc.EngineServiceStub(grpc.insecure_channel(address))
request = engine_pb2.EngineServiceGenerateRequest.FromString(bytes.fromhex(raw))
for message in stub.Generate(request):
    print("message", flush=True)
"""


def request_of(max_tokens: int, **fields: object) -> bytes:
    request = engine_pb2.EngineServiceGenerateRequest(
        prompt=pb.TokenIds(ids=range(11, 111)),
        stopping=pb.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        **fields,  # type: ignore[arg-type]
    )
    return request.SerializeToString()


def long_runner() -> FakeRunner:
    """A runner that works on one request for longer than any test waits."""
    return FakeRunner(num_blocks=16_000, max_model_len=100_000, step_seconds=0.02, window=4)


@pytest.mark.matrix("R45")
@pytest.mark.parametrize("max_tokens", [5, 15_000], ids=["short", "long"])
async def test_a_client_without_a_window_is_ended_on_its_first_message(
    start_fake: StartFake, max_tokens: int
) -> None:
    response = pb.ResponseOptions(logprobs=20)
    async with (
        start_fake(long_runner(), reader_stall_seconds=0.2) as engine,
        connect(engine.server.address, window=0) as client,
    ):
        raw = request_of(max_tokens, response=response)
        stalled = await client.call(GENERATE, raw, ("x-request-id", "stalled"))
        async with asyncio.timeout(LONG):
            while not client.stream(stalled).headers:
                await asyncio.sleep(0.01)
        await engine.idle(LONG)
        await asyncio.sleep(0.4)  # twice the time of a stall, which began before this
        other = await engine.generate([77], stopping=pb.StoppingParams(max_tokens=3))
        assert len(other.tokens()) == 3
        client.widen(stalled, 2**24)
        await asyncio.wait_for(client.stream(stalled).ended.wait(), LONG)
        assert client.stream(stalled).trailers["grpc-status"] == EXHAUSTED
        assert client.stream(stalled).trailers["x-request-id"] == "stalled"
        assert "took no message" in client.stream(stalled).trailers["grpc-message"]


@pytest.mark.matrix("R42")
async def test_a_reset_connection_gives_its_blocks_back(start_fake: StartFake) -> None:
    async with start_fake(long_runner(), reader_stall_seconds=LONG) as engine:
        async with connect(engine.server.address) as client:
            for _ in range(3):
                await client.call(GENERATE, request_of(15_000))
            await engine.until(lambda load: load.running_requests == 3, LONG)
            assert (await engine.load()).kv_cache_usage > 0
            await client.vanish()
        await engine.idle(LONG)
        assert await works(engine)


@pytest.mark.matrix("R42")
async def test_a_killed_client_gives_its_blocks_back(start_fake: StartFake) -> None:
    async with start_fake(long_runner(), reader_stall_seconds=LONG) as engine:
        arguments = (engine.server.address, request_of(15_000).hex())
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENT, *arguments),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert client.stdout is not None
        assert await asyncio.wait_for(client.stdout.readline(), LONG) == b"message\n"
        assert (await engine.load()).kv_cache_usage > 0
        client.send_signal(signal.SIGKILL)
        await client.wait()
        await engine.idle(LONG)
        assert await works(engine)


async def works(engine: Engine) -> bool:
    answer = await engine.generate([77], stopping=pb.StoppingParams(max_tokens=3))
    return len(answer.tokens()) == 3
