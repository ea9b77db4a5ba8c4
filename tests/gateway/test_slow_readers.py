"""Readers that take nothing: they get a status, and give back what they held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2

from tests.gateway.fakes import (
    Behaviour,
    EngineResponse,
    FakeEngine,
    FakeTokenizer,
    Gateway,
    delta,
    endless,
    eventually,
    finish,
    gateway,
    ids_of,
    serving,
    summary,
    tell,
)
from tests.http2 import connect

STREAM = "nanoinfer.v1.GatewayService/GenerateStream"
REQUEST = pb.GatewayServiceGenerateStreamRequest(text="hi").SerializeToString()
LONG = 60.0  # ends a test that hangs; nothing is measured by it


@asynccontextmanager
async def stack(engine: FakeEngine, **settings: Any) -> AsyncIterator[Gateway]:
    async with (
        serving(FakeTokenizer()) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], **settings) as running,
    ):
        yield running


def scoring() -> Behaviour:
    """Brings a prompt's log-probabilities, so that the first message exceeds a usual window."""
    entry = generation_pb2.TokenLogprob(token_id=97, logprob=-1.5, rank=3)
    for token_id in range(20):
        entry.top.add(token_id=token_id, logprob=-2.5, rank=token_id + 1)

    async def behave(request: Any) -> AsyncIterator[EngineResponse]:
        prompt_info = generation_pb2.PromptInfo(prompt_tokens=900, prompt_logprobs=[entry] * 900)
        yield EngineResponse(prompt_info=prompt_info, deltas=[delta([97])])
        yield EngineResponse(finishes=[finish(eos=False)], summary=summary(900, 1))

    return behave


@pytest.mark.matrix("R45")
@pytest.mark.parametrize(
    ("behaviour", "window"),
    [(endless(), 0), (tell(ids_of(b"Hello")), 0), (scoring(), 65535)],
    ids=["endless", "short", "scores"],
)
async def test_a_reader_that_takes_no_first_message_is_ended(
    behaviour: Behaviour, window: int
) -> None:
    engine = FakeEngine(behaviour)
    async with (
        stack(engine, stall_seconds=0.2) as running,
        connect(running.server.address, window=window) as client,
    ):
        stalled = await client.call(STREAM, REQUEST, ("x-request-id", "stalled"))
        await eventually(lambda: bool(client.stream(stalled).headers), LONG)
        await eventually(lambda: engine.num_running == 0, LONG)
        other = await running.stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="abc"))
        assert other.num_tokens == 3
        await asyncio.sleep(0.4)  # twice the time of a stall, which began before this
        client.widen(stalled, 2**24)
        await asyncio.wait_for(client.stream(stalled).ended.wait(), LONG)
        trailers = client.stream(stalled).trailers
        assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert "took no message" in trailers["grpc-message"]
        assert trailers["x-request-id"] == "stalled"
