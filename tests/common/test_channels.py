"""Timeouts of the channels, and that they leave retries to their callers."""

import time
from typing import Any

import grpc
from nanoinfer.v1 import tokenizer_pb2 as pb
from nanoinfer.v1 import tokenizer_pb2_grpc
from nanoinfer_common import errors, names
from nanoinfer_common.channels import open_channel
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.server import ServiceStatus, running
from prometheus_client import CollectorRegistry

from tests.waiting import assert_left


class Tokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Refuses the first calls with UNAVAILABLE and counts all."""

    name = "nanoinfer-tokenizer"
    full_name = "nanoinfer.v1.TokenizerService"

    def __init__(self, status: ServiceStatus, num_refused: int = 0) -> None:
        self.status = status
        self.registry = CollectorRegistry()
        self.num_refused = num_refused
        self.num_calls = 0
        self.timeouts: list[float | None] = []

    def add_to(self, server: grpc.aio.Server) -> None:
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(self, server)

    async def start(self) -> None: ...

    async def drain(self, seconds: float) -> None: ...

    async def stop(self) -> None: ...

    async def Encode(self, request: Any, context: Any) -> Any:
        self.num_calls += 1
        self.timeouts.append(context.time_remaining())
        if self.num_calls <= self.num_refused:
            raise errors.unavailable(names.TOKENIZER_UNAVAILABLE, "not now")
        return pb.TokenizerServiceEncodeResponse()

    async def DecodeStream(self, request: Any, context: Any) -> Any:
        self.timeouts.append(context.time_remaining())
        async for _ in request:
            yield pb.TokenizerServiceDecodeStreamResponse(text="x")


def serving(num_refused: int, made: list[Tokenizer]) -> Any:
    def factory(status: ServiceStatus) -> Tokenizer:
        made.append(Tokenizer(status, num_refused))
        return made[-1]

    return running(factory, ServiceSettings(drain_seconds=0.1))


async def test_a_channel_repeats_no_refused_call() -> None:
    made: list[Tokenizer] = []
    async with serving(1, made) as server, open_channel(server.address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        call: Any = stub.Encode(pb.TokenizerServiceEncodeRequest(text="x"))
        assert (await call.code()).name == "UNAVAILABLE"
    assert made[0].num_calls == 1


async def test_a_shorter_timeout_is_kept_and_a_longer_one_cut() -> None:
    made: list[Tokenizer] = []
    async with serving(0, made) as server, open_channel(server.address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        for timeout, left in ((2, 2), (60, 5)):
            began = time.monotonic()
            await stub.Encode(pb.TokenizerServiceEncodeRequest(text="x"), timeout=timeout)
            assert_left(made[0].timeouts[-1], left, time.monotonic() - began)


async def test_only_unary_tokenizer_calls_get_five_seconds() -> None:
    made: list[Tokenizer] = []
    async with serving(0, made) as server, open_channel(server.address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        began = time.monotonic()
        await stub.Encode(pb.TokenizerServiceEncodeRequest(text="x"))
        spent = time.monotonic() - began
        request = pb.TokenizerServiceDecodeStreamRequest()
        assert len([reply async for reply in stub.DecodeStream(iter([request]))]) == 1
    unary, stream = made[0].timeouts
    assert_left(unary, 5, spent)
    assert stream is None
