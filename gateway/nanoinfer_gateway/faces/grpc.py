"""The gRPC face: `GatewayService`'s eight RPCs, proto in and proto out, over the core."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import gateway_pb2_grpc
from nanoinfer_common import telemetry
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.status import ServiceStatus
from nanoinfer_common.stream_writes import StreamWriter, WriteSlots
from nanoinfer_common.validation import read_metadata

from nanoinfer_gateway.core.caller import Caller
from nanoinfer_gateway.core.collecting import Answer
from nanoinfer_gateway.core.completions import Update
from nanoinfer_gateway.core.gateway import Gateway
from nanoinfer_gateway.core.requests import Prompt

PromptRequest = pb.GatewayServiceGenerateRequest | pb.GatewayServiceGenerateStreamRequest
Response = TypeVar("Response", pb.GatewayServiceGenerateResponse, pb.GatewayServiceChatResponse)


class GrpcFace(gateway_pb2_grpc.GatewayServiceServicer):
    """The servicer; metadata and deadlines of calls become a `Caller`.

    `settings` bound the deadlines, `slots` the messages written at one time, `writer` ends streams
    whose readers take nothing.
    """

    def __init__(
        self,
        gateway: Gateway,
        settings: ServiceSettings,
        status: ServiceStatus,
        slots: WriteSlots,
        writer: StreamWriter,
    ) -> None:
        self._gateway = gateway
        self._settings = settings
        self._status = status
        self._slots = slots
        self._writer = writer

    async def Generate(
        self, request: pb.GatewayServiceGenerateRequest, context: Any
    ) -> pb.GatewayServiceGenerateResponse:
        """Complete a prompt and return the whole result."""
        with self._gateway.metrics.request("Generate"):
            answer = await self._gateway.answer(
                _prompt_of(request),
                request.options,
                self._caller(context),
                parse_special_tokens=request.parse_special_tokens,
            )
            return _whole(answer, pb.GatewayServiceGenerateResponse)

    async def GenerateStream(  # type: ignore[override]
        self, request: pb.GatewayServiceGenerateStreamRequest, context: Any
    ) -> None:
        """Complete a prompt and stream text deltas."""
        with self._gateway.metrics.request("GenerateStream"):
            updates = self._gateway.generate(
                _prompt_of(request),
                request.options,
                self._caller(context),
                self._slots.hold,
                parse_special_tokens=request.parse_special_tokens,
            )
            await self._write_all(updates, pb.GatewayServiceGenerateStreamResponse, context)

    async def Chat(
        self, request: pb.GatewayServiceChatRequest, context: Any
    ) -> pb.GatewayServiceChatResponse:
        """Answer a conversation and return the whole result."""
        with self._gateway.metrics.request("Chat"):
            answer = await self._gateway.answer(
                request.messages, request.options, self._caller(context)
            )
            return _whole(answer, pb.GatewayServiceChatResponse)

    async def ChatStream(  # type: ignore[override]
        self, request: pb.GatewayServiceChatStreamRequest, context: Any
    ) -> None:
        """Answer a conversation and stream text deltas."""
        with self._gateway.metrics.request("ChatStream"):
            updates = self._gateway.generate(
                request.messages, request.options, self._caller(context), self._slots.hold
            )
            await self._write_all(updates, pb.GatewayServiceChatStreamResponse, context)

    async def CountTokens(
        self, request: pb.GatewayServiceCountTokensRequest, context: Any
    ) -> pb.GatewayServiceCountTokensResponse:
        """Count the tokens of a prompt or a conversation."""
        with self._gateway.metrics.request("CountTokens"):
            is_text = request.WhichOneof("input") != "conversation"
            num_tokens = await self._gateway.count_tokens(
                request.text if is_text else request.conversation.messages,
                self._caller(context),
                request.model if request.HasField("model") else None,
                parse_special_tokens=request.parse_special_tokens,
            )
            return pb.GatewayServiceCountTokensResponse(num_tokens=num_tokens)

    async def ListModels(
        self, request: pb.GatewayServiceListModelsRequest, context: Any
    ) -> pb.GatewayServiceListModelsResponse:
        """List the models that the engines serve."""
        page, next_token = self._gateway.list_models(request.page_size, request.page_token)
        return pb.GatewayServiceListModelsResponse(models=page, next_page_token=next_token)

    async def GetModelInfo(
        self, request: pb.GatewayServiceGetModelInfoRequest, context: Any
    ) -> pb.GatewayServiceGetModelInfoResponse:
        """Describe one model."""
        model = self._gateway.model(request.model if request.HasField("model") else None)
        return pb.GatewayServiceGetModelInfoResponse(model=model)

    async def GetServerInfo(
        self, request: pb.GatewayServiceGetServerInfoRequest, context: Any
    ) -> pb.GatewayServiceGetServerInfoResponse:
        """Describe the server."""
        return pb.GatewayServiceGetServerInfoResponse(server=self._status.info())

    def _caller(self, context: Any) -> Caller:
        """Read metadata and deadline; the interceptor has chosen the request's id already.

        Raises INVALID_ARGUMENT (INVALID_METADATA).
        """
        metadata = read_metadata(context.invocation_metadata(), telemetry.request_id())
        remaining = context.time_remaining()
        if remaining is None:
            remaining = self._settings.default_deadline_seconds
        seconds = min(remaining, self._settings.max_deadline_seconds)
        return Caller(
            metadata.request_id, metadata.priority, metadata.tenant, time.monotonic() + seconds
        )

    async def _write_all(
        self,
        updates: AsyncGenerator[Update, None],
        response: type[pb.GatewayServiceGenerateStreamResponse]
        | type[pb.GatewayServiceChatStreamResponse],
        context: Any,
    ) -> None:
        """Write each update; STREAM_STALLED for a reader that takes none for too long.

        Written here rather than yielded, so that a cancel during a write ends everything at once.
        """
        async with aclosing(updates):
            async for update in updates:
                message = response(
                    prompt_info=update.prompt_info,
                    deltas=update.deltas,
                    finishes=update.finishes,
                    summary=update.summary,
                )
                await self._writer.write(context, message)


def _prompt_of(request: PromptRequest) -> Prompt:
    """Return the prompt that is set, an empty text where none is."""
    is_ids = request.WhichOneof("prompt") == "token_ids"
    return request.token_ids if is_ids else request.text


def _whole(answer: Answer, response: type[Response]) -> Response:
    return response(prompt_info=answer.prompt_info, choices=answer.choices, summary=answer.summary)
