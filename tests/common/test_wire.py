"""What never reaches a handler: oversize, foreign and broken messages (library statuses)."""

import asyncio
import random
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc
from nanoinfer.v1 import tokenizer_pb2 as tokenizer
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.server import running

from tests.common.conftest import start_probe
from tests.common.probe import FULL_NAME, ProbeService, call

MALFORMED = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.INVALID_ARGUMENT,
}


class Chat(gateway_pb2_grpc.GatewayServiceServicer):
    async def Chat(self, request: Any, context: Any) -> Any:
        return gateway_pb2.GatewayServiceChatResponse()


class TypedProbe(ProbeService):
    full_name = "nanoinfer.v1.GatewayService"

    def add_to(self, server: grpc.aio.Server) -> None:
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(Chat(), server)


async def status_of(call: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = await asyncio.wait_for(call.code(), 60)
    assert "Traceback" not in f"{await call.details()}"
    return code


@pytest.mark.matrix("R6")
async def test_oversize_messages() -> None:
    async with start_probe(max_message_bytes=100_000) as probe:
        unary: Any = probe.channel.unary_unary(f"/{FULL_NAME}/unary_unary")
        assert await status_of(unary(b"x" * 90_000)) is grpc.StatusCode.OK
        assert await status_of(unary(b"x" * 110_000)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await status_of(unary(b"still here")) is grpc.StatusCode.OK


@pytest.mark.matrix("R7")
async def test_oversize_metadata() -> None:
    async with start_probe() as probe:
        unary: Any = probe.channel.unary_unary(f"/{FULL_NAME}/unary_unary")
        big = unary(b"x", metadata=(("x-big", "y" * 20_000),))
        assert await status_of(big) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await status_of(unary(b"x", metadata=(("x-ok", "y" * 4_000),))) is grpc.StatusCode.OK


@pytest.mark.matrix("R8", "R9", "R11")
async def test_foreign_bytes() -> None:
    valid = gateway_pb2.GatewayServiceChatRequest(
        messages=[tokenizer.ChatMessage(role="user", content=[tokenizer.ContentPart(text="hi")])]
    ).SerializeToString()
    nested = b""
    for _ in range(129):
        nested = b"\x0a" + bytes([len(nested) & 0x7F]) + nested[:127]
    source = random.Random(7)
    cases = [
        (valid, {grpc.StatusCode.OK}),
        (b"", {grpc.StatusCode.OK}),
        (valid[:-1], MALFORMED),
        (b"\xff" * 50, MALFORMED),
        # Invalid UTF-8 in a string field.
        (b"\x0a\x04\x0a\x02\xc3\x28", MALFORMED),
        # An unknown field is passed over.
        (valid + b"\xf8\x3f\x01", {grpc.StatusCode.OK}),
    ]
    cases += [(source.randbytes(40), {*MALFORMED, grpc.StatusCode.OK}) for _ in range(40)]
    cases += [(nested, {*MALFORMED, grpc.StatusCode.OK})]
    async with (
        running(TypedProbe, ServiceSettings()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        chat: Any = channel.unary_unary("/nanoinfer.v1.GatewayService/Chat")
        for sent, allowed in cases:
            assert await status_of(chat(sent)) in allowed, sent
        assert await status_of(chat(valid)) is grpc.StatusCode.OK


async def test_a_thousand_cancels_leave_nothing_behind() -> None:
    async with start_probe() as probe:
        stream: Any = probe.channel.unary_stream(f"/{FULL_NAME}/unary_stream")
        for _ in range(10):
            calls = [stream(b"wait") for _ in range(100)]
            await calls[-1].read()
            for running_call in calls:
                running_call.cancel()
        while probe.service.running:
            await asyncio.sleep(0.01)
        finished = await call(probe.channel, "unary_unary", b"fine")
        assert await finished.code() is grpc.StatusCode.OK
