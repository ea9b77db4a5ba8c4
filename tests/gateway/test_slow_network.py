"""A network of 200 ms a round trip that loses packets: the same answers, later."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import gateway_pb2_grpc, tokenizer_pb2

from tests.gateway.fakes import FakeEngine, FakeTokenizer, gateway, ids_of, serving, tell
from tests.proxy import Proxy

TEXT = "Hello world " * 5


async def answers(stub: Any) -> Sequence[Any]:
    """What a client sees of every way to ask: text, finish and counts."""
    generate = pb.GatewayServiceGenerateStreamRequest(text="hi")
    streamed = [message async for message in stub.GenerateStream(generate)]
    messages = [
        tokenizer_pb2.ChatMessage(role="user", content=[tokenizer_pb2.ContentPart(text="hi")])
    ]
    whole = await stub.Chat(pb.GatewayServiceChatRequest(messages=messages))
    counted = await stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="hello"))
    return (
        "".join(delta.text for message in streamed for delta in message.deltas),
        [finish for message in streamed for finish in message.finishes],
        streamed[-1].summary.usage,
        whole.choices,
        counted.num_tokens,
    )


@pytest.mark.matrix("R69")
async def test_answers_over_a_bad_network_are_the_same(
    tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    engine.behaviour = tell(ids_of(*TEXT.encode()), pause=0.005)
    # One piece in 20 has to be sent again, five times the row's 1 %.
    bad = [Proxy(delay=0.1, stalls_every=20) for _ in range(3)]
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        servers = [await enter(serving(tokenizer)), await enter(serving(engine))]
        direct = await enter(gateway([servers[0].address], [servers[1].address]))
        expected = await answers(direct.stub)
        assert expected[0] == expected[3][0].text == TEXT
        far = [await enter(bad[i].to(servers[i].address)) for i in range(2)]
        slow = await enter(gateway([far[0].address], [far[1].address]))
        edge = await enter(bad[2].to(slow.server.address))
        channel = await enter(grpc.aio.insecure_channel(edge.address))
        stubs = gateway_pb2_grpc.GatewayServiceStub(channel)
        assert await answers(stubs) == expected
        assert engine.num_running == 0
    assert all(proxy.num_stalls for proxy in bad)
    assert bad[2].num_connections == 1  # the client did not have to come back
