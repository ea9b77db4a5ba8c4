"""A tokenizer that dies under a stream of ids: no text is lost, and none comes twice."""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer.v1 import generation_pb2, tokenizer_pb2_grpc
from nanoinfer.v1 import tokenizer_pb2 as pb
from nanoinfer_common.channels import open_channel
from nanoinfer_tokenizer.loading import LoadedTokenizer

from tests.tokenizer.test_process import service

TEXT = "Zwölf 👩‍👩‍👧 你好, 😀😃 and the quick brown fox" * 3
PATIENCE = 60.0


async def decode(call: Any, token_ids: list[int]) -> str:
    """Sends ids over a stream and returns the text that they complete."""
    tokens = generation_pb2.TokenIds(ids=token_ids)
    await call.write(pb.TokenizerServiceDecodeStreamRequest(tokens=tokens))
    answer = await asyncio.wait_for(call.read(), PATIENCE)
    return str(answer.text)


async def serving(address: str) -> None:
    """Waits until the service at an address has loaded."""
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), wait_for_ready=True)
        async for reply in watch:
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return


@pytest.mark.matrix("R62")
async def test_a_stream_of_ids_goes_on_elsewhere_from_what_was_received(
    loaded: Callable[[str], LoadedTokenizer],
    directory_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tokens = loaded("gpt2").encoding.vocabulary.spelling.tokens
    # Single bytes, so that characters are incomplete at most places.
    token_ids = [tokens.index(bytes([byte])) for byte in TEXT.encode()]
    with ExitStack() as stack:
        (process, first), (_, second) = (
            stack.enter_context(service(directory_of("gpt2"), tmp_path / f"port-{i}"))
            for i in range(2)
        )
        await asyncio.gather(serving(first), serving(second))
        async with open_channel(first) as channel, open_channel(second) as other_channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            call = stub.DecodeStream(timeout=PATIENCE)
            received, num_sent = "", 0
            while num_sent < 8:
                received += await decode(call, [token_ids[num_sent]])
                num_sent += 1
            sent = TEXT.encode()[:num_sent]
            assert received == sent.decode(errors="ignore")
            assert received.encode() != sent  # it dies in the middle of a character
            os.kill(process.pid, signal.SIGKILL)
            # The second where the client knows before it sends.
            with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
                await decode(call, token_ids[num_sent:])
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert received == sent.decode(errors="ignore")
            # As the contract says: all ids again, less the text that is there.
            elsewhere = tokenizer_pb2_grpc.TokenizerServiceStub(other_channel)
            again = elsewhere.DecodeStream(timeout=PATIENCE)
            received += (await decode(again, token_ids))[len(received) :]
            assert received == TEXT
            await again.done_writing()
            assert await again.code() is grpc.StatusCode.OK
