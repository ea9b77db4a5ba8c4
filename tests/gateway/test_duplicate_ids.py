"""A request id is a label: two requests of one id at once are two requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2

from tests.gateway.fakes import (
    EngineResponse,
    FakeEngine,
    FakeTokenizer,
    Gateway,
    delta,
    eventually,
    finish,
    summary,
)

OPTIONS = pb.GenerationOptions(request_id="twice")


async def text_of(running: Gateway, prompt: str) -> tuple[str, str]:
    """The streamed text, and the id that the summary names."""
    request = pb.GatewayServiceGenerateStreamRequest(text=prompt, options=OPTIONS)
    text, request_id = "", ""
    call = running.stub.GenerateStream(request, timeout=60)
    try:
        async for message in call:
            text += "".join(each.text for each in message.deltas)
            request_id = message.summary.request_id or request_id
    finally:
        call.cancel()  # gRPC does not, where its caller is cancelled while the request is sent
    return text, request_id


@pytest.mark.matrix("R36")
async def test_two_requests_of_one_id_at_once_get_each_their_own_stream(
    running_gateway: Gateway, engine: FakeEngine, tokenizer: FakeTokenizer
) -> None:
    both = asyncio.Event()

    async def repeat(request: Any) -> AsyncIterator[EngineResponse]:
        """Tells the prompt back, once both requests are there."""
        if len(engine.requests) > 1:
            both.set()
        await both.wait()
        ids = list(request.prompt.ids)
        yield EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=len(ids)))
        for token_id in ids:
            yield EngineResponse(deltas=[delta([token_id])])
            await asyncio.sleep(0)
        yield EngineResponse(finishes=[finish()], summary=summary(len(ids), len(ids) + 1))

    engine.behaviour = repeat
    prompts = ("first prompt", "another one")
    answers = await asyncio.gather(*(text_of(running_gateway, prompt) for prompt in prompts))
    assert answers == [(prompt, "twice") for prompt in prompts]
    assert [request.request_id for request in engine.requests] == ["twice", "twice"]


@pytest.mark.matrix("R36")
async def test_to_cancel_one_of_two_requests_of_one_id_leaves_the_other(
    running_gateway: Gateway, engine: FakeEngine, tokenizer: FakeTokenizer
) -> None:
    go_on = asyncio.Event()

    async def wait(request: Any) -> AsyncIterator[EngineResponse]:
        ids = list(request.prompt.ids)
        yield EngineResponse(prompt_info=generation_pb2.PromptInfo(prompt_tokens=len(ids)))
        await go_on.wait()
        yield EngineResponse(deltas=[delta(ids)])
        yield EngineResponse(finishes=[finish()], summary=summary(len(ids), len(ids) + 1))

    engine.behaviour = wait
    first, second = [
        asyncio.create_task(text_of(running_gateway, prompt)) for prompt in ("first", "second")
    ]
    await eventually(lambda: engine.num_running == 2, 60)
    first.cancel()
    await eventually(lambda: engine.num_running == 1, 60)
    go_on.set()
    assert await second == ("second", "twice")
    assert first.cancelled()
