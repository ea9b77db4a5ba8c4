"""A request of very many parts is refused, and the streams of others go on meanwhile."""

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import tokenizer_pb2

from tests.gateway.fakes import FakeEngine, FakeTokenizer, Gateway, endless, gateway, serving

NUM_PARTS = 1_900_000
MESSAGE = b"\x0a\x04user" + b"\x12\x02\x0a\x00" * NUM_PARTS  # each part is an empty text


def delimited(tag: int, data: bytes) -> bytes:
    """A field of bytes on the wire."""
    size, varint = len(data), b""
    while size > 0x7F:
        varint += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([tag << 3 | 2]) + varint + bytes([size]) + data


REQUESTS = {
    "CountTokens": delimited(2, delimited(1, MESSAGE)),
    "Chat": delimited(1, MESSAGE),
    "ChatStream": delimited(1, MESSAGE),
}


async def longest_turn(until: "asyncio.Future[Any]") -> float:
    """The most CPU seconds that the loop's thread spends between two turns of a task."""
    longest, last = 0.0, time.thread_time()
    while not until.done():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.parametrize("method", REQUESTS)
async def test_a_conversation_of_two_million_parts_stalls_nobody(
    method: str, tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    async with (
        serving(tokenizer) as tokenizer_server,
        serving(engine) as engine_server,
        gateway(
            [tokenizer_server.address], [engine_server.address], max_message_bytes=2**23
        ) as running,
    ):
        await check(method, running)
    assert not tokenizer.named("RenderChat")


async def check(method: str, running: Gateway) -> None:
    message = tokenizer_pb2.ChatMessage.FromString(MESSAGE)
    start = time.thread_time()
    assert all(part.WhichOneof("part") for part in message.content)
    one_loop = time.thread_time() - start
    del message

    stream = running.stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi"))
    assert await stream.read()
    name = f"/nanoinfer.v1.GatewayService/{method}"
    channel = running.channel
    is_stream = method.endswith("Stream")
    call: Any = (channel.unary_stream if is_stream else channel.unary_unary)(name)(REQUESTS[method])
    ended = asyncio.ensure_future(call.code())
    longest = await longest_turn(ended)
    assert ended.result() is grpc.StatusCode.INVALID_ARGUMENT
    status = await rpc_status.aio.from_call(call)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad) for detail in status.details)
    assert [violation.field for violation in bad.field_violations] == ["messages"]
    # What gRPC and protobuf do in C is left; a single loop of Python over the parts is longer.
    assert longest < one_loop
    assert await stream.read()
    stream.cancel()
