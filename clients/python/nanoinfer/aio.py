"""The client for an event loop."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any, ClassVar, Self, Unpack

import grpc

from nanoinfer import health, queries
from nanoinfer.base import Call, ClientBase
from nanoinfer.options import CallOptions, Messages, Options, Prompt
from nanoinfer.queries import Query, Result
from nanoinfer.results import Completion
from nanoinfer.streams import AsyncStream, Until
from nanoinfer.v1.generation_pb2 import ModelInfo, ServerInfo

CONNECT_POLL_SECONDS = 0.01


class AsyncClient(ClientBase):
    """`Client` for asyncio: the same methods and options, awaited. Build it inside the loop.

    Cancelling the task that waits for a call cancels the call.
    """

    _transport: ClassVar[Any] = grpc.aio

    async def generate(self, prompt: Prompt, **settings: Unpack[Options]) -> Completion:
        """`Client.generate`, awaited."""
        return await self._run(queries.generate(prompt, settings))

    async def chat(self, messages: Messages, **settings: Unpack[Options]) -> Completion:
        """`Client.chat`, awaited."""
        return await self._run(queries.chat(messages, settings))

    def stream(
        self, prompt: Prompt | Messages, *, until: Until | None = None, **settings: Unpack[Options]
    ) -> AsyncStream:
        """`Client.stream`; the stream is what is awaited."""
        query = queries.stream(prompt, settings)
        call, started = self._call(query), time.monotonic()
        # Sent at once, or left to gRPC until there is a connection; the reader minds how long.
        call.start(self._method(query), self._waits and not self._is_connected())
        return AsyncStream(call, until, lambda: self._connect(call, started))

    async def generate_batch(
        self, prompts: Iterable[Prompt], *, max_concurrency: int = 32, **settings: Unpack[Options]
    ) -> list[Completion]:
        """`Client.generate_batch`, awaited."""
        queries.check_batch(prompts, max_concurrency)
        slots = asyncio.Semaphore(max_concurrency)

        async def one(prompt: Prompt) -> Completion:
            async with slots:
                return await self.generate(prompt, **settings)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt)) for prompt in prompts]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def count_tokens(
        self,
        text_or_messages: str | Messages,
        *,
        model: str | None = None,
        **settings: Unpack[CallOptions],
    ) -> int:
        """`Client.count_tokens`, awaited."""
        return await self._run(queries.count_tokens(text_or_messages, model, settings))

    async def models(self, **settings: Unpack[CallOptions]) -> list[ModelInfo]:
        """`Client.models`, awaited."""
        models, next_page = await self._run(queries.models("", settings))
        while next_page:
            more, next_page = await self._run(queries.models(next_page, settings))
            models += more
        return models

    async def model_info(
        self, model: str | None = None, **settings: Unpack[CallOptions]
    ) -> ModelInfo:
        """`Client.model_info`, awaited."""
        return await self._run(queries.model_info(model, settings))

    async def server_info(self, **settings: Unpack[CallOptions]) -> ServerInfo:
        """`Client.server_info`, awaited."""
        return await self._run(queries.server_info(settings))

    async def wait_until_ready(self, timeout: float = 30.0) -> None:
        """`Client.wait_until_ready`, awaited."""
        end, status = time.monotonic() + timeout, "unreachable"
        check = health.method(self._channel)
        while (remaining := end - time.monotonic()) > 0:
            try:
                status = await check(health.READINESS, timeout=remaining)
            except grpc.RpcError as error:
                if error.code() in health.ANSWERED:
                    return
                status = health.cause(error)
            if status == "SERVING":
                return
            await asyncio.sleep(health.POLL_SECONDS)
        raise health.not_ready(self.target, timeout, status)

    async def close(self) -> None:
        """`Client.close`, awaited."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, query: Query[Result]) -> Result:
        call, started = self._call(query), time.monotonic()
        with call.receiving():
            await self._connect(call, started)
            call.start(self._method(query), elapsed=time.monotonic() - started)
            response = await call.rpc
        call.succeed(await call.rpc.trailing_metadata())
        return call.decode(response)

    def _is_connected(self) -> bool:
        state = self._channel.get_state(try_to_connect=self._waits)
        return state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.SHUTDOWN)

    async def _connect(self, call: Call[Any], started: float) -> None:
        """Waits for a connection; raises the call's status where there is none in time."""
        seconds = self._patience(call)
        # Not `channel_ready`: given up, it leaves a watch that outlives the event loop.
        while self._waits and not self._is_connected():
            if call.rpc is not None and call.rpc.done():
                return
            if time.monotonic() < started + seconds:
                await asyncio.sleep(CONNECT_POLL_SECONDS)
                continue
            try:
                await health.method(self._channel)(health.READINESS, timeout=health.PROBE_SECONDS)
            except grpc.RpcError as error:
                if error.code() not in health.ANSWERED:
                    raise call.abandon(seconds, health.cause(error)) from None
            return
