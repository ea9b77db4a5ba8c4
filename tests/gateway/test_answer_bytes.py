"""The bytes of answers: what is refused, what waits, and what is given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2
from nanoinfer_common.errors import ServiceError, from_rpc_error
from nanoinfer_gateway.core.answer_bytes import ENTRY_BYTES, AnswerBytes, WholeAnswer
from nanoinfer_gateway.core.generation import MAX_PENDING_BYTES

from tests.gateway.fakes import (
    EngineResponse,
    FakeEngine,
    FakeTokenizer,
    delta,
    eventually,
    finish,
    gateway,
    model_info,
    serving,
    summary,
)
from tests.http2 import connect

LONG = 60.0  # ends a test that hangs; nothing is measured by it
STREAM = "nanoinfer.v1.GatewayService/GenerateStream"
FEATURES = [
    generation_pb2.FEATURE_LOGPROBS,
    generation_pb2.FEATURE_PROMPT_LOGPROBS,
    generation_pb2.FEATURE_MULTIPLE_CHOICES,
]


def streamed(asked: pb.GenerationOptions) -> bytes:
    request = pb.GatewayServiceGenerateStreamRequest(text="hi", options=asked)
    return request.SerializeToString()


def options(**response: Any) -> pb.GenerationOptions:
    max_tokens = response.pop("max_tokens", None)
    return pb.GenerationOptions(
        sampling=generation_pb2.SamplingParams(n=response.pop("n", 1)),
        stopping=generation_pb2.StoppingParams(max_tokens=max_tokens),
        response=generation_pb2.ResponseOptions(**response),
    )


def whole(asked: pb.GenerationOptions, max_bytes: int) -> WholeAnswer:
    return WholeAnswer(asked, asked.sampling.n, model_info(max_model_len=1000), max_bytes)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"logprobs": 20, "n": 4}, "response.logprobs"),
        ({"logprob_token_ids": range(21), "n": 4}, "response.logprob_token_ids"),
        ({"return_token_ids": True, "n": 300}, "stopping.max_tokens"),
    ],
)
def test_an_answer_that_can_never_fit_names_its_field(asked: dict[str, Any], field: str) -> None:
    asked["max_tokens"] = 100
    with pytest.raises(ServiceError) as raised:
        whole(options(**asked), 50_000).check()
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.reason == "ANSWER_TOO_LARGE"
    assert [violation.field for violation in raised.value.violations] == [field]
    whole(options(**asked), 10_000_000).check()
    asked["max_tokens"] = None  # may end early
    whole(options(**asked), 50_000).check()


def test_what_an_answer_may_need_is_reserved_and_given_back() -> None:
    total = AnswerBytes(10_000)
    asked = options(logprobs=1, max_tokens=100)
    with total.share() as first, total.share() as second:
        whole(asked, 50_000).reserve(first)
        assert total.num_bytes == 100 * 2 * ENTRY_BYTES
        whole(asked, 50_000).reserve(second)
        with pytest.raises(ServiceError) as raised, total.share() as third:
            whole(asked, 50_000).reserve(third)
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.retry_after is not None
        with total.share() as text_alone:
            whole(options(), 50_000).reserve(text_alone)
            assert text_alone.num_bytes == 0
    assert total.num_bytes == 0


def test_an_answer_counts_what_comes_beyond_its_reservation() -> None:
    total = AnswerBytes(10_000)
    answer = whole(options(), 5_000)
    with total.share() as share:
        for _ in range(5):
            answer.add(1_000, share)
        assert total.num_bytes == 5_000
        with pytest.raises(ServiceError, match=r"stopping\.max_tokens asks for an answer of more"):
            answer.add(1, share)
    assert total.num_bytes == 0


def heavy(length: int | None, alternatives: int = 20) -> Any:
    entry = generation_pb2.TokenLogprob(token_id=97, logprob=-1.5, rank=3)
    for token_id in range(alternatives):
        entry.top.add(token_id=token_id, logprob=-2.5, rank=token_id + 1)

    async def behave(request: Any) -> AsyncIterator[EngineResponse]:
        yield EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=2))
        number = 0
        while length is None or number < length:
            number += 1
            yield EngineResponse(deltas=[delta([97], 0, [entry])])
            counts[request.request_id] = number
            await asyncio.sleep(0)
        yield EngineResponse(finishes=[finish(eos=False)], summary=summary(2, number))

    counts: dict[str, int] = {}
    behave.counts = counts  # type: ignore[attr-defined]
    return behave


@pytest.mark.matrix("R45")
@pytest.mark.parametrize("max_buffered_bytes", [2**25, 4096], ids=["own bound", "bound of all"])
async def test_an_unread_stream_stops_its_engine_by_bytes(max_buffered_bytes: int) -> None:
    """4,096 tokens of 21 log-probabilities would be 2 MB and more, and none is read."""
    behaviour = heavy(None)
    engine = FakeEngine(behaviour, model_info(features=FEATURES))
    async with (
        serving(FakeTokenizer()) as one,
        serving(engine) as two,
        gateway(
            [one.address], [two.address], max_buffered_bytes=max_buffered_bytes, stall_seconds=LONG
        ) as running,
    ):
        async with connect(running.server.address) as client:
            await client.call(STREAM, streamed(options(logprobs=20)))
            await eventually(lambda: bool(client.streams[0].data), LONG)
            counts = behaviour.counts
            await still(lambda: sum(counts.values()))
            # The transport holds 64 KiB on either side besides, and there messages have half of
            # the bytes that they count here, and less where they are small.
            most = min(max_buffered_bytes, MAX_PENDING_BYTES) + 16 * 65536
            assert sum(counts.values()) * 21 * ENTRY_BYTES < most
            assert sum(counts.values()) < 4096
        await eventually(lambda: engine.num_running == 0, LONG)


async def still(value: Any) -> None:
    """Wait until a count has not moved for a while."""
    async with asyncio.timeout(LONG):
        before = -1
        while before != (now := value()):
            before = now
            await asyncio.sleep(0.5)


async def test_the_prompts_log_probabilities_are_reserved_before_the_engine_is_asked() -> None:
    engine = FakeEngine(heavy(None), model_info(features=FEATURES))
    async with (
        serving(FakeTokenizer()) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], max_buffered_bytes=100_000) as running,
    ):
        scoring = pb.GatewayServiceGenerateRequest(text="x" * 900)
        scoring.options.response.prompt_logprobs = 20
        scoring.options.stopping.max_tokens = 1
        async with connect(running.server.address) as client:
            await client.call(STREAM, streamed(options(logprobs=20)))
            await still(lambda: sum(engine.behaviour.counts.values()))  # type: ignore[attr-defined]
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await running.stub.Generate(scoring)
            refused = from_rpc_error(raised.value)
            assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refused.retry_after is not None
            assert len(engine.requests) == 1
        await eventually(lambda: engine.num_running == 0, LONG)
        engine.behaviour = heavy(1)
        assert (await running.stub.Generate(scoring)).choices  # alone it may have it all
        assert (await running.stub.Generate(scoring)).choices  # and gives it back
