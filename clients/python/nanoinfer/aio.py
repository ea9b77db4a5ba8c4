"""The client for an event loop."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self, Unpack

import grpc

from nanoinfer import health, options
from nanoinfer.base import ClientBase
from nanoinfer.calls import Call
from nanoinfer.options import CallOptions, Message, Options, Prompt
from nanoinfer.results import Completion, whole
from nanoinfer.streams import CLOSED, AsyncStream, Until, cancelled_by_caller
from nanoinfer.v1 import gateway_pb2
from nanoinfer.v1.generation_pb2 import ModelInfo, ServerInfo


class AsyncClient(ClientBase):
    """`Client` for asyncio: the same methods and options, awaited. Build it inside the loop.

    Cancelling the task that waits for a call cancels the call.
    """

    _transport: ClassVar[Any] = grpc.aio

    async def generate(self, prompt: Prompt, **settings: Unpack[Options]) -> Completion:
        """Completes a prompt, given as text or as token ids."""
        options.check_names(settings, Options)
        request = options.generate_request(
            prompt, settings, gateway_pb2.GatewayServiceGenerateRequest
        )
        return await self._complete("Generate", self._stub.Generate, request, settings)

    async def chat(self, messages: Sequence[Message], **settings: Unpack[Options]) -> Completion:
        """Answers a conversation."""
        options.check_names(settings, Options)
        request = options.chat_request(messages, settings, gateway_pb2.GatewayServiceChatRequest)
        return await self._complete("Chat", self._stub.Chat, request, settings)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        *,
        until: Until | None = None,
        **settings: Unpack[Options],
    ) -> AsyncStream:
        """Streams the answer to a conversation, where messages are given, else to a prompt.

        `until` sees the text so far after each delta; True ends the stream and cancels the call.
        """
        return AsyncStream(*self._open_stream(prompt, settings), until)

    async def generate_batch(
        self, prompts: Iterable[Prompt], *, max_concurrency: int = 32, **settings: Unpack[Options]
    ) -> list[Completion]:
        """Completes prompts as separate requests, `max_concurrency` at a time; results keep order.

        The engine batches what runs together. The first failure cancels the rest and is raised.
        """
        if max_concurrency < 1:
            raise ValueError("max_concurrency must be at least 1")
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
        text_or_messages: str | Sequence[Message],
        *,
        model: str | None = None,
        **settings: Unpack[CallOptions],
    ) -> int:
        """The number of tokens of a text or a conversation, special tokens included."""
        request = options.count_request(text_or_messages, model)
        response = await self._call("CountTokens", self._stub.CountTokens, request, settings)
        return int(response.num_tokens)

    async def models(self, **settings: Unpack[CallOptions]) -> list[ModelInfo]:
        """Every served model, by name."""
        models: list[ModelInfo] = []
        request = gateway_pb2.GatewayServiceListModelsRequest()
        while True:
            page = await self._call("ListModels", self._stub.ListModels, request, settings)
            models.extend(page.models)
            request.page_token = page.next_page_token
            if not request.page_token:
                return models

    async def model_info(
        self, model: str | None = None, **settings: Unpack[CallOptions]
    ) -> ModelInfo:
        """A model's description, its defaults included; the served one where no name is given."""
        request = gateway_pb2.GatewayServiceGetModelInfoRequest(model=model)
        method = self._stub.GetModelInfo
        info: ModelInfo = (await self._call("GetModelInfo", method, request, settings)).model
        return info

    async def server_info(self, **settings: Unpack[CallOptions]) -> ServerInfo:
        """The gateway's description."""
        request = gateway_pb2.GatewayServiceGetServerInfoRequest()
        method = self._stub.GetServerInfo
        info: ServerInfo = (await self._call("GetServerInfo", method, request, settings)).server
        return info

    async def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Returns once the gateway says that it is ready; raises `Unavailable` after `timeout`."""
        end = time.monotonic() + timeout
        check = self._channel.unary_unary(health.CHECK, health.serialize, health.deserialize)
        status = "unreachable"
        while (remaining := end - time.monotonic()) > 0:
            try:
                status = str(await check(health.READINESS, timeout=remaining))
            except grpc.RpcError as error:
                if error.code() in health.ANSWERED:
                    return
            if status == "SERVING":
                return
            await asyncio.sleep(min(health.POLL_SECONDS, max(0.0, end - time.monotonic())))
        raise health.not_ready(self.target, timeout, status)

    async def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _complete(
        self, name: str, method: Any, request: object, settings: Options
    ) -> Completion:
        call = self._open(name, settings)
        response, trace_id = await _await(call, call.invoke(method, request))
        return whole(response, call.request_id, trace_id)

    async def _call(self, name: str, method: Any, request: object, settings: CallOptions) -> Any:
        options.check_names(settings, CallOptions)
        call = self._open(name, settings)
        return (await _await(call, call.invoke(method, request)))[0]


async def _await(call: Call, response: Any) -> tuple[Any, str | None]:
    try:
        message = await response
    except asyncio.CancelledError:
        if cancelled_by_caller():
            call.cancel()
            raise
        raise call.fail(grpc.StatusCode.CANCELLED, CLOSED, ()) from None
    except grpc.RpcError as error:
        raise call.fail(error.code(), error.details(), error.trailing_metadata()) from None
    return message, call.succeed(await response.trailing_metadata())
