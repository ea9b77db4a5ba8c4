"""A tokenizer service in this event loop, with a stub, and how its refusals are read."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import tokenizer_pb2 as pb
from nanoinfer.v1 import tokenizer_pb2_grpc
from nanoinfer_common.errors import ServiceError, from_rpc_error
from nanoinfer_common.server import running
from nanoinfer_tokenizer.service import TokenizerService
from nanoinfer_tokenizer.settings import TokenizerSettings
from prometheus_client import CollectorRegistry


class Served:
    """A running service, its stub and channel."""

    def __init__(self, service: TokenizerService, channel: grpc.aio.Channel) -> None:
        self.service = service
        self.channel = channel
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self.registry: CollectorRegistry = service.registry


Serve = Callable[..., Awaitable[Served]]


@asynccontextmanager
async def serving(model: Path, **options: Any) -> AsyncIterator[Served]:
    """Runs the service of a model's tokenizer on a free port."""
    settings = TokenizerSettings(
        model=model, port=0, metrics_port=None, num_template_workers=1, **options
    )
    made: list[TokenizerService] = []

    def factory(status: Any) -> TokenizerService:
        made.append(TokenizerService(settings, status))
        return made[0]

    async with (
        running(factory, settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Served(made[0], channel)


async def refused(call: Awaitable[Any]) -> ServiceError:
    """Gives the error that `call` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert caught.value.trailing_metadata() is not None
    return error


def conversation(*said: tuple[str, str], **options: bool) -> pb.TokenizerServiceRenderChatRequest:
    messages = [
        pb.ChatMessage(role=role, content=[pb.ContentPart(text=text)]) for role, text in said
    ]
    return pb.TokenizerServiceRenderChatRequest(messages=messages, **options)


async def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until the condition holds; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
