"""Replicas that come, go, fail and fill up; failover; tokenizers that change."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import engine_pb2, generation_pb2
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer_common.errors import ServiceError, unavailable
from nanoinfer_gateway.upstreams.fleet import Connection
from nanoinfer_gateway.upstreams.replicas import Replicas

from tests.gateway.fakes import (
    TOKENS,
    EngineResponse,
    FakeEngine,
    FakeTokenizer,
    delta,
    endless,
    eventually,
    gateway,
    ids_of,
    model_info,
    serving,
    tell,
)
from tests.gateway.test_service import reason

REQUEST = pb.GatewayServiceGenerateRequest(text="hi")
STREAM = pb.GatewayServiceGenerateStreamRequest(text="hi")


def ignore(*_: object) -> None:
    """Stands for a gateway that is not interested."""


def watch(resolve: Any, interval: float, silence: float = 3.0) -> Replicas:
    return Replicas(resolve, interval, silence, ignore, ignore, ignore)


@asynccontextmanager
async def replicas_of(
    *engines: FakeEngine,
) -> AsyncIterator[tuple[Replicas, dict[str, FakeEngine], set[str]]]:
    """Replicas over real sockets; the set is what the look-up finds."""
    async with AsyncExitStack() as stack:
        by_target: dict[str, FakeEngine] = {}
        for engine in engines:
            server = await stack.enter_async_context(serving(engine))
            by_target[f"ipv4:{server.address}"] = engine
        found = set(by_target)

        async def resolve() -> Collection[str]:
            return found

        replicas = watch(resolve, 0.02)
        await replicas.start()
        stack.push_async_callback(replicas.stop)
        yield replicas, by_target, found


def num_candidates(replicas: Replicas) -> int:
    tried: set[Connection] = set()
    while replicas.has_other("fake", tried):
        tried.add(replicas.pick("fake", tried).connection)
    return len(tried)


async def test_the_least_loaded_replica_is_picked() -> None:
    busy, idle = FakeEngine(), FakeEngine()
    busy.report(running_requests=4, waiting_requests=3, kv_cache_usage=0.5)
    idle.report(running_requests=5, waiting_requests=0, kv_cache_usage=0.1)
    async with replicas_of(busy, idle) as (replicas, engines, _):
        await eventually(lambda: num_candidates(replicas) == 2)
        assert engines[replicas.pick("fake").target] is idle
        idle.report(running_requests=5, waiting_requests=40)
        await eventually(lambda: engines[replicas.pick("fake").target] is busy)


async def test_requests_in_flight_here_count_before_any_report() -> None:
    random.seed(7)  # two of three are drawn
    async with replicas_of(FakeEngine(), FakeEngine(), FakeEngine()) as (replicas, _, _):
        await eventually(lambda: num_candidates(replicas) == 3)
        held = AsyncExitStack()
        picked = []
        for _ in range(9):
            replica = replicas.pick("fake")
            held.enter_context(replica.in_flight())
            picked.append(replica.target)
        counts = [picked.count(target) for target in set(picked)]
        assert len(counts) == 3
        assert max(counts) - min(counts) <= 2, "the better of two drawn keeps them near"
        await held.aclose()


async def test_a_full_replica_comes_last_and_a_closed_one_never() -> None:
    full, loaded = FakeEngine(), FakeEngine()
    full.report(admission_state=engine_pb2.ADMISSION_STATE_FULL)
    loaded.report(running_requests=50, waiting_requests=50)
    async with replicas_of(full, loaded) as (replicas, engines, _):
        await eventually(lambda: num_candidates(replicas) == 2)
        assert engines[replicas.pick("fake").target] is loaded
        loaded.report(admission_state=engine_pb2.ADMISSION_STATE_CLOSED)
        await eventually(lambda: engines[replicas.pick("fake").target] is full)
        full.report(admission_state=engine_pb2.ADMISSION_STATE_CLOSED)
        await eventually(lambda: not replicas.any_serving)
        with pytest.raises(ServiceError) as raised:
            replicas.pick("fake")
        assert raised.value.reason == "NO_ENGINE"


@pytest.mark.matrix("R71")
async def test_replicas_come_and_go_with_the_look_up() -> None:
    first, second = FakeEngine(), FakeEngine()
    async with replicas_of(first, second) as (replicas, engines, found):
        gone, stays = list(found)
        await eventually(lambda: num_candidates(replicas) == 2)
        held = next(r for r in replicas._replicas.values() if r.target == gone)
        engines[gone].behaviour = endless()
        with held.in_flight():
            call = held.stub.Generate(engine_pb2.EngineServiceGenerateRequest())
            await call.read()
            found.discard(gone)
            await eventually(lambda: num_candidates(replicas) == 1)
            assert replicas.pick("fake").target == stays
            assert isinstance(await call.read(), EngineResponse)  # what runs there goes on
            assert len(replicas._retiring) == 1
            call.cancel()
        await eventually(lambda: not replicas._retiring)
        found.add(gone)
        await eventually(lambda: num_candidates(replicas) == 2)


@pytest.mark.matrix("R71")
async def test_a_failed_or_empty_look_up_changes_nothing() -> None:
    outcome: list[Any] = [{"ipv4:127.0.0.1:1"}, OSError("no name server"), set()]

    async def resolve() -> Collection[str]:
        result = outcome.pop(0) if len(outcome) > 1 else outcome[0]
        if isinstance(result, OSError):
            raise result
        return result

    replicas = watch(resolve, 60)
    await replicas.start()
    await replicas.refresh()
    await replicas.refresh()
    assert list(replicas._replicas) == ["ipv4:127.0.0.1:1"]
    await replicas.stop()


async def test_a_restarted_engine_is_asked_for_its_model_again() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:

        async def resolve() -> Collection[str]:
            return [server.address]

        replicas = watch(resolve, 60)
        await replicas.start()
        await eventually(lambda: replicas.any_serving)
        await server.kill()
        await eventually(lambda: not replicas.any_serving)
        assert replicas.model("fake").id == "fake"  # known, though nobody serves it now
        async with serving(FakeEngine(model=model_info("new")), server.address):
            await eventually(lambda: replicas.any_serving, 60)
            assert [model.id for model in replicas.models()] == ["new"]
            assert replicas.pick("new").serving
            await replicas.stop()


async def test_an_engine_that_refuses_is_replaced_before_the_first_message() -> None:
    failing, good = FakeEngine(), FakeEngine()
    failing.behaviour = refuse(unavailable("SHUTTING_DOWN", "bye"))
    good.report(running_requests=9)
    async with stack_of(FakeTokenizer(), failing, good) as running:
        answer = await running.stub.Generate(REQUEST)
        assert answer.choices[0].text == "Hello world"
        assert (len(failing.requests), len(good.requests)) == (1, 1)


def refuse(error: ServiceError) -> Any:
    async def behave(request: Any) -> AsyncIterator[EngineResponse]:
        raise error
        yield EngineResponse()

    return behave


@asynccontextmanager
async def stack_of(
    tokenizer: FakeTokenizer, *engines: FakeEngine, **settings: Any
) -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(tokenizer))
        addresses = []
        for engine in engines:
            server = await stack.enter_async_context(serving(engine))
            addresses.append(server.address)
        running = await stack.enter_async_context(gateway([one.address], addresses, **settings))
        await eventually(lambda: all_known(engines))
        yield running


def all_known(engines: Collection[FakeEngine]) -> bool:
    """Whether the gateway has read every engine's load once."""
    return all(engine.num_reports > 0 for engine in engines)


async def test_only_unavailable_is_tried_elsewhere() -> None:
    error = ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=2)
    failing, good = FakeEngine(behaviour=refuse(error)), FakeEngine()
    good.report(running_requests=9)
    async with stack_of(FakeTokenizer(), failing, good) as running:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(REQUEST)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(raised.value) == "QUEUE_FULL"
        assert good.requests == []


async def test_when_every_engine_refuses_the_last_one_is_believed() -> None:
    engines = [FakeEngine(behaviour=refuse(unavailable("LOADING", "wait"))) for _ in range(4)]
    async with stack_of(FakeTokenizer(), *engines) as running:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(REQUEST)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(raised.value) == "LOADING"
        assert sum(len(engine.requests) for engine in engines) == 3


async def test_an_engine_that_dies_before_its_first_message_is_replaced() -> None:
    dying, good = FakeEngine(), FakeEngine()
    hanging = asyncio.Event()

    async def hang(request: Any) -> AsyncIterator[EngineResponse]:
        hanging.set()
        await asyncio.sleep(600)
        yield EngineResponse()

    dying.behaviour = hang
    good.report(running_requests=9)
    tokenizer = FakeTokenizer()
    async with (
        serving(tokenizer) as one,
        serving(dying) as two,
        serving(good) as three,
        gateway([one.address], [two.address, three.address]) as running,
    ):
        await eventually(lambda: all_known([dying, good]))
        answer = asyncio.ensure_future(whole(running))
        await asyncio.wait_for(hanging.wait(), 60)
        await two.kill()
        assert (await answer).choices[0].text == "Hello world"
        assert len(good.requests) == 1


@pytest.mark.matrix("R58")
async def test_an_engine_that_dies_mid_stream_ends_it_with_what_was_delivered() -> None:
    dying, good = FakeEngine(), FakeEngine()
    told = asyncio.Event()

    async def tell_then_hang(request: Any) -> AsyncIterator[EngineResponse]:
        yield EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=2))
        yield EngineResponse(deltas=[delta(ids_of(b"Hello", b" world"))])
        told.set()
        await asyncio.sleep(600)

    dying.behaviour = tell_then_hang
    good.report(running_requests=9)
    async with (
        serving(FakeTokenizer()) as one,
        serving(dying) as two,
        serving(good) as three,
        gateway([one.address], [two.address, three.address]) as running,
    ):
        await eventually(lambda: all_known([dying, good]))
        call = running.stub.GenerateStream(STREAM)
        received: list[str] = []
        reading = asyncio.create_task(read_text(call, received))
        await eventually(lambda: "".join(received) == "Hello world")
        await two.kill()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await reading
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(raised.value) == "ENGINE_LOST_MID_STREAM"
        assert good.requests == []


async def whole(running: Any) -> Any:
    return await running.stub.Generate(REQUEST)


async def read_text(call: Any, received: list[str]) -> None:
    async for message in call:
        received.extend(text.text for text in message.deltas)


@pytest.mark.matrix("R61")
async def test_tokenizers_share_the_work() -> None:
    first, second = FakeTokenizer(), FakeTokenizer()
    async with (
        serving(first) as one,
        serving(second) as two,
        serving(FakeEngine()) as three,
        gateway([one.address, two.address], [three.address]) as running,
    ):
        async with asyncio.timeout(60):
            while not (first.named("Encode") and second.named("Encode")):
                await running.stub.Generate(REQUEST)
        await one.kill()
        for _ in range(10):
            await running.stub.Generate(REQUEST)


async def test_a_changed_tokenizer_brings_its_vocabulary() -> None:
    tokenizer = FakeTokenizer()
    engine = FakeEngine(behaviour=tell([0x41]))
    async with stack_of(tokenizer, engine) as running:
        assert (await running.stub.Generate(REQUEST)).choices[0].text == "A"
        tokenizer.fingerprint = b"\x05" * 32
        tokenizer.tokens = [*TOKENS[:0x41], b"changed", *TOKENS[0x42:]]
        answer = await running.stub.Generate(REQUEST)
        assert answer.choices[0].text == "changed"
        assert answer.summary.tokenizer_fingerprint == b"\x05" * 32
        assert engine.requests[-1].tokenizer_fingerprint == b"\x05" * 32
        assert len(tokenizer.named("GetVocabulary")) == 2


async def test_a_slow_tokenizer_is_unavailable_after_the_hops_cap() -> None:
    tokenizer = FakeTokenizer()

    async def hang(context: Any) -> None:
        await asyncio.sleep(600)

    async with stack_of(tokenizer, FakeEngine(), tokenizer_timeout_seconds=0.3) as running:
        tokenizer.before = hang
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(REQUEST, timeout=60)
        assert reason(raised.value) == "TOKENIZER_UNAVAILABLE"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(REQUEST, timeout=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
