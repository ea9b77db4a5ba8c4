"""The asyncio client against a gateway in this process."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import nanoinfer
import pytest
from nanoinfer import AsyncClient, Client
from nanoinfer.v1 import gateway_pb2

from tests.client.fake_gateway import SUMMARY, Behaviour, finish, refusal
from tests.client.test_client import STREAM, USER, endless


async def cancelled(behaviour: Behaviour) -> bool:
    return await asyncio.to_thread(behaviour.cancelled.wait, 1.0)


async def test_both_clients_give_the_same(
    async_client: AsyncClient, target: str, behaviour: Behaviour
) -> None:
    with Client(target) as client:
        whole = await asyncio.to_thread(client.generate, "x")
        assert await async_client.generate("x", temperature=0.0) == whole
        assert behaviour.arrivals[-1].request.options.sampling.HasField("temperature")
        assert await async_client.chat([USER]) == whole
        assert await async_client.stream("x").result() == whole
        assert await async_client.stream([USER]).result() == whole
        assert await async_client.models() == await asyncio.to_thread(client.models)
    assert behaviour.arrivals[-1].metadata["x-request-id"]
    assert await async_client.count_tokens("x") == 11
    assert (await async_client.model_info()).id == "served"
    assert (await async_client.server_info()).version == "1.2.3"
    await async_client.wait_until_ready(5)


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)


async def test_stream(async_client: AsyncClient) -> None:
    stream = async_client.stream("x")
    assert [delta.text async for delta in stream] == ["Hello", ", ", "world", ""]
    assert stream.text == "Hello, world"
    assert (await stream.result()).trace_id == "ab" * 16


@pytest.mark.parametrize("way", ["aclose", "with", "break", "task"])
async def test_leaving_a_stream_cancels_upstream(
    async_client: AsyncClient, behaviour: Behaviour, way: str
) -> None:
    behaviour.stream = endless
    if way == "aclose":
        stream = async_client.stream("x")
        await anext(stream)
        await stream.aclose()
        assert [delta async for delta in stream] == []
        assert (await stream.result()).finish_reason is None
    elif way == "with":
        async with async_client.stream("x") as inner:
            await anext(inner)
    elif way == "break":
        async for _ in async_client.stream("x"):
            break
    else:
        task = asyncio.create_task(async_client.stream("x").result())
        while not behaviour.arrivals:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gc.collect()
    assert await cancelled(behaviour)


async def test_closing_from_another_task_ends_the_iteration(
    async_client: AsyncClient, behaviour: Behaviour
) -> None:
    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield STREAM(deltas=[gateway_pb2.TextDelta(text="a")])
        behaviour.cancelled.wait(60)

    behaviour.stream = silent
    stream = async_client.stream("x")
    await anext(stream)
    reader = asyncio.create_task(stream.result())
    await asyncio.sleep(0.1)
    await stream.aclose()
    assert (await asyncio.wait_for(reader, 60)).text == "a"


async def test_until(async_client: AsyncClient, behaviour: Behaviour) -> None:
    behaviour.stream = endless
    stream = async_client.stream("x", until=lambda text: text.count("word") >= 3)
    assert "".join([delta.text async for delta in stream]) == "word word word "
    assert await cancelled(behaviour)
    assert (await stream.result()).text == "word word word "


async def test_errors(async_client: AsyncClient, behaviour: Behaviour) -> None:
    full = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=0.5)

    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort_with_status(full)

    def breaks(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for _ in range(100):
            yield STREAM(deltas=[gateway_pb2.TextDelta(text="a")])
        context.abort_with_status(full)

    behaviour.unary, behaviour.stream = refuse, breaks
    with pytest.raises(nanoinfer.Overloaded, match="full") as caught:
        await async_client.generate("x")
    assert caught.value.retry_after == 0.5
    stream = async_client.stream("x")
    with pytest.raises(nanoinfer.Overloaded) as broken:
        await stream.result()
    assert broken.value.partial is not None
    assert broken.value.partial.text == "a" * 100
    behaviour.stream = endless
    with pytest.raises(nanoinfer.DeadlineExceeded):
        await async_client.stream("x", timeout=0.3).result()


async def test_closing_the_client_is_an_error_for_what_is_under_way(
    target: str, behaviour: Behaviour
) -> None:
    behaviour.stream = endless
    client = AsyncClient(target)
    stream = client.stream("x")
    await anext(stream)
    reader = asyncio.create_task(stream.result())
    await asyncio.sleep(0.1)
    await client.close()
    with pytest.raises(nanoinfer.Cancelled):
        await asyncio.wait_for(reader, 60)


async def test_no_server() -> None:
    async with AsyncClient("127.0.0.1:1", wait_for_ready=False) as client:
        with pytest.raises(nanoinfer.Unavailable):
            await client.generate("x")
        with pytest.raises(nanoinfer.Unavailable, match="not ready within"):
            await client.wait_until_ready(0.3)


async def test_batch(async_client: AsyncClient, behaviour: Behaviour) -> None:
    lock, running, peak = threading.Lock(), [0], [0]

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        if request.text == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad one")
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        time.sleep(0.1 if request.text == "p0" else 0.02)
        with lock:
            running[0] -= 1
        choice = gateway_pb2.Choice(text=request.text.upper(), finish=finish())
        return gateway_pb2.GatewayServiceGenerateResponse(choices=[choice], summary=SUMMARY)

    behaviour.unary = slow
    prompts = [f"p{number}" for number in range(12)]
    completions = await async_client.generate_batch(prompts, max_concurrency=4)
    assert [completion.text for completion in completions] == [p.upper() for p in prompts]
    assert peak[0] == 4
    with pytest.raises(nanoinfer.InvalidRequest, match="bad one"):
        await async_client.generate_batch(["a", "bad", "b"], max_concurrency=2)
