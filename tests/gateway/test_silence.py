"""Replicas that freeze or are cut off get nothing; what they have not answered moves elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2
from nanoinfer_gateway.upstreams.interruption import Interruption, Silence
from nanoinfer_gateway.upstreams.tokenizers import CHECKS_IN_SILENCE

from tests.gateway.fakes import (
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
)
from tests.gateway.silent_fakes import (
    SILENCE_SECONDS,
    BeatingEngine,
    BeatingTokenizer,
    Line,
    serving_beating,
)
from tests.gateway.test_service import reason

REQUEST = pb.GatewayServiceGenerateRequest(text="hi")
STREAM = pb.GatewayServiceGenerateStreamRequest(text="hi")
STALLED, SERVING = generation_pb2.SERVER_STATE_STALLED, generation_pb2.SERVER_STATE_SERVING


@asynccontextmanager
async def stack_of(
    engines: Sequence[FakeEngine],
    tokenizers: Sequence[BeatingTokenizer] = (),
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """A gateway that has heard of every replica."""
    async with AsyncExitStack() as stack:
        found = list(tokenizers) or [BeatingTokenizer()]
        addresses: list[list[str]] = [[], []]
        for tokenizer in found:
            server = await stack.enter_async_context(serving_beating(tokenizer))
            addresses[0].append(server.address)
        for engine in engines:
            server = await stack.enter_async_context(serving(engine))
            addresses[1].append(server.address)
        values = {"silence_seconds": SILENCE_SECONDS, **settings}
        running = await stack.enter_async_context(gateway(*addresses, **values))
        await eventually(lambda: all(engine.num_reports for engine in engines))
        await eventually(lambda: all(tokenizer.num_checks for tokenizer in found))
        yield running


def preferred() -> tuple[BeatingEngine, BeatingEngine]:
    """Two engines, of which the first gets the requests while it is there."""
    first, second = BeatingEngine(), BeatingEngine()
    second.report(running_requests=9)
    return first, second


async def whole(running: Gateway, seconds: float = 60) -> Any:
    return await running.stub.Generate(REQUEST, timeout=seconds)


@pytest.mark.matrix("R59")
async def test_a_silent_engine_gets_no_requests_until_it_reports_again() -> None:
    frozen, good = preferred()
    async with stack_of([frozen, good]) as running:
        await whole(running)
        assert (len(frozen.requests), len(good.requests)) == (1, 0)
        frozen.thawed.clear()
        await eventually(lambda: frozen.num_watchers > 1, 60)  # on a new connection
        for _ in range(3):
            assert (await whole(running)).choices[0].text == "Hello world"
        assert (len(frozen.requests), len(good.requests)) == (1, 3)
        frozen.thawed.set()
        while len(frozen.requests) == 1:
            await whole(running)


@pytest.mark.matrix("R59")
async def test_a_request_without_a_message_moves_from_a_silent_engine() -> None:
    frozen, good = preferred()
    async with stack_of([frozen, good]) as running:
        frozen.thawed.clear()
        call = running.stub.GenerateStream(STREAM, timeout=60)
        text = "".join([delta.text async for message in call for delta in message.deltas])
        assert text == "Hello world"
        assert (len(frozen.requests), len(good.requests)) == (1, 1)
        assert frozen.requests[0] == good.requests[0]
        await asyncio.wait_for(frozen.cancelled.wait(), 60)
        frozen.thawed.set()


@pytest.mark.matrix("R59")
async def test_a_request_with_a_message_stays_and_goes_on_when_the_engine_does() -> None:
    frozen, good = preferred()

    async def tell(request: Any) -> AsyncIterator[EngineResponse]:
        yield EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=2))
        yield EngineResponse(deltas=[delta(ids_of(b"Hello"))])
        frozen.thawed.clear()
        await frozen.thawed.wait()
        yield EngineResponse(deltas=[delta(ids_of(b" world"))])
        yield EngineResponse(finishes=[finish()], summary=summary(2, 3))

    frozen.behaviour = tell
    async with stack_of([frozen, good]) as running:
        answer = asyncio.ensure_future(whole(running))
        await eventually(lambda: frozen.num_watchers > 1, 60)
        assert not answer.done()
        frozen.thawed.set()
        assert (await answer).choices[0].text == "Hello world"
        assert (len(frozen.requests), len(good.requests)) == (1, 0)


async def test_without_another_engine_a_request_waits_and_the_gateway_is_not_ready() -> None:
    engine = BeatingEngine()
    async with stack_of([engine]) as running:
        engine.thawed.clear()
        answer = asyncio.ensure_future(whole(running))
        await eventually(lambda: running.server.status.state == STALLED, 60)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await whole(running)
        assert reason(raised.value) == "NO_ENGINE"
        assert not answer.done()
        engine.thawed.set()
        assert (await answer).choices[0].text == "Hello world"
        await eventually(lambda: running.server.status.state == SERVING, 60)


async def test_a_moved_request_keeps_its_deadline_and_moves_a_bounded_number_of_times() -> None:
    engines = [BeatingEngine() for _ in range(4)]

    async def freeze(request: Any) -> AsyncIterator[EngineResponse]:
        for engine in engines:
            if len(engine.requests) and engine.thawed.is_set():
                engine.thawed.clear()
        await asyncio.Event().wait()
        yield EngineResponse()

    for engine in engines:
        engine.behaviour = freeze
    async with stack_of(engines) as running:
        answer = asyncio.ensure_future(whole(running, 8 * SILENCE_SECONDS))
        await eventually(lambda: sum(len(engine.requests) for engine in engines) == 3, 60)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await answer
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert sorted(len(engine.requests) for engine in engines) == [0, 1, 1, 1]
        for engine in engines:
            engine.thawed.set()


async def test_an_engine_that_reports_changes_alone_is_never_called_silent() -> None:
    quiet, tokenizer = FakeEngine(), BeatingTokenizer()
    async with stack_of([quiet], [tokenizer]) as running:
        enough = tokenizer.num_checks + 3 * CHECKS_IN_SILENCE
        await eventually(lambda: tokenizer.num_checks > enough, 60)
        assert quiet.num_reports == 1
        assert running.server.status.state == SERVING
        await whole(running)
        assert len(quiet.requests) == 1


@pytest.mark.matrix("R68")
async def test_an_engine_that_is_cut_off_leaves_and_returns_over_a_new_connection() -> None:
    cut, good = preferred()
    async with (
        serving_beating(BeatingTokenizer()) as one,
        serving(cut) as two,
        serving(good) as three,
        Line.to(two.address) as line,
        gateway(
            [one.address], [line.address, three.address], silence_seconds=SILENCE_SECONDS
        ) as running,
    ):
        await eventually(lambda: cut.num_reports > 0 and good.num_reports > 0)
        await whole(running)
        assert (len(cut.requests), len(good.requests)) == (1, 0)
        line.cut()
        answers = [await whole(running) for _ in range(3)]  # the first one finds it out
        assert [answer.choices[0].text for answer in answers] == ["Hello world"] * 3
        assert (len(cut.requests), len(good.requests)) == (1, 3)
        line.mend()
        async with asyncio.timeout(60):
            while len(cut.requests) == 1:
                await whole(running)
        assert line.num_connections > 1


@pytest.mark.matrix("R59")
async def test_what_a_frozen_tokenizer_does_not_answer_is_asked_of_another() -> None:
    frozen, good = BeatingTokenizer(), BeatingTokenizer()
    async with stack_of([BeatingEngine()], [frozen, good]) as running:
        await whole(running)
        frozen.thawed.clear()
        answers = await asyncio.gather(*(whole(running) for _ in range(6)))
        assert {answer.choices[0].text for answer in answers} == {"Hello world"}
        asked = len(frozen.named("Encode"))
        for _ in range(4):
            await whole(running)
        assert len(frozen.named("Encode")) == asked, "it is out of rotation"
        frozen.thawed.set()
        async with asyncio.timeout(60):
            while len(frozen.named("Encode")) == asked:
                await whole(running)


async def test_a_tokenizer_that_hangs_in_one_call_is_replaced_for_it() -> None:
    hanging, good = BeatingTokenizer(), BeatingTokenizer()

    async def hang(context: Any) -> None:
        await asyncio.Event().wait()

    settings = {"tokenizer_timeout_seconds": 1.0}
    async with stack_of([BeatingEngine()], [hanging, good], **settings) as running:
        await whole(running)
        hanging.before = hang
        for _ in range(4):
            assert (await whole(running)).choices[0].text == "Hello world"
        assert hanging.named("Encode")
        good.before = hang
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await whole(running)
        assert reason(raised.value) == "TOKENIZER_UNAVAILABLE"


async def test_readiness_follows_what_tokenizers_say_and_whether_they_say_it() -> None:
    tokenizer = BeatingTokenizer()
    async with stack_of([BeatingEngine()], [tokenizer]) as running:
        status = running.server.status
        tokenizer.is_serving = False
        await eventually(lambda: status.state == STALLED, 60)
        tokenizer.is_serving = True
        await eventually(lambda: status.state == SERVING, 60)
        tokenizer.thawed.clear()
        await eventually(lambda: status.state == STALLED, 60)
        tokenizer.thawed.set()
        await eventually(lambda: status.state == SERVING, 60)


async def test_a_refused_call_is_repeated_on_another_tokenizer_and_at_most_four_times() -> None:
    first, second = BeatingTokenizer(), BeatingTokenizer()

    async def refuse(context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "leaving")

    async with stack_of([BeatingEngine()], [first, second]) as running:
        await whole(running)
        first.before = refuse
        for _ in range(4):
            await whole(running)
        second.before = refuse
        before = len(first.named("Encode")) + len(second.named("Encode"))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await whole(running)
        assert reason(raised.value) == "TOKENIZER_UNAVAILABLE"
        assert len(first.named("Encode")) + len(second.named("Encode")) == before + 4


async def test_endless_streams_of_a_silent_engine_can_be_cancelled() -> None:
    engine = BeatingEngine(behaviour=endless())
    async with stack_of([engine]) as running:
        call = running.stub.GenerateStream(STREAM)
        await call.read()
        engine.thawed.clear()
        await eventually(lambda: engine.num_watchers > 1, 60)
        call.cancel()
        await asyncio.wait_for(engine.cancelled.wait(), 60)
        assert engine.num_running == 0
        engine.thawed.set()


async def test_a_pause_of_this_process_is_no_silence_of_another() -> None:
    with Silence(0.2, TimeoutError("silent")) as silence:
        for _ in range(3):
            time.sleep(0.3)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            silence.heard(0.2)
    with pytest.raises(TimeoutError, match="silent"), Silence(0.2, TimeoutError("silent")):
        await asyncio.sleep(60)
    with Silence(0.02, TimeoutError("silent")) as silence:
        silence.heard(None)
        await asyncio.sleep(0.1)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_a_cancel_from_outside_stays_one_in_an_interrupted_block() -> None:
    interruption = Interruption(TimeoutError())
    entered = asyncio.Event()

    async def block() -> None:
        with interruption:
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(block())
    await entered.wait()
    interruption.interrupt()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_fake_without_a_health_service_counts_as_serving() -> None:
    async with (
        serving(FakeTokenizer()) as one,
        serving(BeatingEngine()) as two,
        gateway([one.address], [two.address], silence_seconds=SILENCE_SECONDS) as running,
    ):
        assert (await whole(running)).choices[0].text == "Hello world"
