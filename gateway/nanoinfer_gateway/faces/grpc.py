"""GatewayService: the eight RPCs, proto in and proto out, over the one generation core."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from functools import partial
from typing import Any

import grpc
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import gateway_pb2_grpc, generation_pb2
from nanoinfer_common.status import ServiceStatus
from nanoinfer_common.stream_writes import StreamWriter, WriteSlots
from nanoinfer_common.telemetry import add_to_log_line, set_attributes
from nanoinfer_common.validation import Limits

from nanoinfer_gateway.core.admission import Admission, Bounds
from nanoinfer_gateway.core.answer_bytes import AnswerBytes, WholeAnswer
from nanoinfer_gateway.core.catalogue import list_page
from nanoinfer_gateway.core.collecting import collect
from nanoinfer_gateway.core.completions import Update
from nanoinfer_gateway.core.generation import Generation, Prompt, Slot, Upstreams
from nanoinfer_gateway.core.metrics import GatewayMetrics
from nanoinfer_gateway.core.requests import RequestReader, prompt_of, refuse_parsing
from nanoinfer_gateway.core.telemetry import request_attributes, result_attributes
from nanoinfer_gateway.core.vocabulary import Vocabularies
from nanoinfer_gateway.settings import GatewaySettings
from nanoinfer_gateway.upstreams import addresses
from nanoinfer_gateway.upstreams.readiness import Readiness
from nanoinfer_gateway.upstreams.replicas import Replicas
from nanoinfer_gateway.upstreams.routing import Engines, Tokenizer
from nanoinfer_gateway.upstreams.tokenizers import Tokenizers


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """The gateway as a service of `nanoinfer_common.server`; made inside the event loop.

    It is ready while at least one tokenizer and one engine serve. Without them health says
    NOT_SERVING and the state STALLED, but nothing is refused for it: requests are told what lacks.
    """

    name = "nanoinfer-gateway"
    full_name = "nanoinfer.v1.GatewayService"

    def __init__(self, settings: GatewaySettings, status: ServiceStatus) -> None:
        self._settings = settings
        self._status = status
        self._metrics = GatewayMetrics()
        self.registry = self._metrics.registry
        self._slots = WriteSlots(settings.num_write_slots)
        self._writer = StreamWriter(settings.stall_seconds)
        self._admission = Admission(
            Bounds(
                settings.max_requests,
                settings.max_prompt_tokens,
                settings.max_prompt_bytes,
                settings.max_tenant_requests,
            ),
            self._metrics.rejected,
        )
        self._tokenizers = Tokenizers(
            partial(addresses.resolve, settings.tokenizer),
            settings.resolve_seconds,
            settings.silence_seconds,
            lambda: self._readiness.update(),
            partial(self._report_fault, "tokenizers"),
        )
        self._tokenizer = Tokenizer(
            self._tokenizers, settings.tokenizer_timeout_seconds, self._metrics.upstream
        )
        self._vocabularies = Vocabularies(self._tokenizer.vocabulary)
        self._replicas = Replicas(
            partial(addresses.resolve, settings.engine),
            settings.resolve_seconds,
            settings.silence_seconds,
            lambda: self._readiness.update(),
            partial(self._report_fault, "engines"),
            self._metrics.weights,
        )
        self._readiness = Readiness(
            lambda: self._tokenizers.any_serving,
            lambda: self._replicas.any_serving,
            self._report_readiness,
        )
        self._upstreams = Upstreams(
            self._tokenizer,
            Engines(self._replicas, self._metrics.upstream),
            self._vocabularies.get,
        )
        self._reader = RequestReader(settings, self._replicas)
        self._answers = AnswerBytes(settings.max_buffered_bytes)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the handlers."""
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Connect. Ready comes later, once upstreams serve."""
        if not self._settings.ready_without_upstreams:
            self._status.set_stalled()
        await self._tokenizers.start()
        await self._replicas.start()

    async def drain(self, seconds: float) -> None:
        """Nothing to do: the server lets running calls finish, and nothing outlives its call."""

    async def stop(self) -> None:
        """Close every channel and end every background task."""
        await self._vocabularies.close()
        await self._replicas.stop()
        await self._tokenizers.stop()

    def _report_readiness(self, is_ready: bool) -> None:
        if is_ready:
            self._vocabularies.prefetch()
            self._status.set_serving()
        elif not self._settings.ready_without_upstreams:
            self._status.set_stalled()

    def _report_fault(self, what: str, task: str, is_faulty: bool) -> None:
        self._status.set_fault(f"{what}: {task}", is_faulty)

    async def Generate(
        self, request: pb.GatewayServiceGenerateRequest, context: Any
    ) -> pb.GatewayServiceGenerateResponse:
        """Complete a prompt and return the whole result."""
        with self._metrics.request("Generate"):
            updates = self._updates(
                prompt_of(request),
                request.options,
                context,
                nullcontext,
                is_stream=False,
                parse_special_tokens=request.parse_special_tokens,
            )
            return await collect(updates, pb.GatewayServiceGenerateResponse())

    async def GenerateStream(  # type: ignore[override]
        self, request: pb.GatewayServiceGenerateStreamRequest, context: Any
    ) -> None:
        """Complete a prompt and stream text deltas."""
        with self._metrics.request("GenerateStream"):
            updates = self._updates(
                prompt_of(request),
                request.options,
                context,
                self._slots.hold,
                is_stream=True,
                parse_special_tokens=request.parse_special_tokens,
            )
            await self._write_all(updates, pb.GatewayServiceGenerateStreamResponse, context)

    async def Chat(
        self, request: pb.GatewayServiceChatRequest, context: Any
    ) -> pb.GatewayServiceChatResponse:
        """Answer a conversation and return the whole result."""
        with self._metrics.request("Chat"):
            updates = self._updates(
                request.messages, request.options, context, nullcontext, is_stream=False
            )
            return await collect(updates, pb.GatewayServiceChatResponse())

    async def ChatStream(  # type: ignore[override]
        self, request: pb.GatewayServiceChatStreamRequest, context: Any
    ) -> None:
        """Answer a conversation and stream text deltas."""
        with self._metrics.request("ChatStream"):
            updates = self._updates(
                request.messages, request.options, context, self._slots.hold, is_stream=True
            )
            await self._write_all(updates, pb.GatewayServiceChatStreamResponse, context)

    async def CountTokens(
        self, request: pb.GatewayServiceCountTokensRequest, context: Any
    ) -> pb.GatewayServiceCountTokensResponse:
        """Count the tokens of a prompt or a conversation."""
        with self._metrics.request("CountTokens"):
            is_text = request.WhichOneof("input") != "conversation"
            prompt: Prompt = request.text if is_text else request.conversation.messages
            if not is_text:
                refuse_parsing(request, "a conversation")
            self._reader.validate_prompt(prompt, Limits())
            if request.HasField("model"):
                self._replicas.model(request.model)
            metadata, call = self._reader.metadata(context)
            num_bytes = self._reader.num_bytes(prompt)
            with self._admission.reserve(tenant=metadata.tenant, num_bytes=num_bytes):
                if is_text:
                    encoded = await self._tokenizer.encode(
                        request.text, call, parse_special_tokens=request.parse_special_tokens
                    )
                else:
                    encoded = await self._tokenizer.render_chat(request.conversation.messages, call)
            return pb.GatewayServiceCountTokensResponse(num_tokens=len(encoded.tokens.ids))

    async def ListModels(
        self, request: pb.GatewayServiceListModelsRequest, context: Any
    ) -> pb.GatewayServiceListModelsResponse:
        """List the models that the engines serve."""
        page, next_token = list_page(self._replicas.models(), request.page_size, request.page_token)
        return pb.GatewayServiceListModelsResponse(models=page, next_page_token=next_token)

    async def GetModelInfo(
        self, request: pb.GatewayServiceGetModelInfoRequest, context: Any
    ) -> pb.GatewayServiceGetModelInfoResponse:
        """Describe one model."""
        model = self._replicas.model(request.model if request.HasField("model") else None)
        return pb.GatewayServiceGetModelInfoResponse(model=model)

    async def GetServerInfo(
        self, request: pb.GatewayServiceGetServerInfoRequest, context: Any
    ) -> pb.GatewayServiceGetServerInfoResponse:
        """Describe the server."""
        return pb.GatewayServiceGetServerInfoResponse(server=self._status.info())

    async def _updates(
        self,
        prompt: Prompt,
        options: pb.GenerationOptions,
        context: Any,
        slot: Slot,
        *,
        is_stream: bool,
        parse_special_tokens: bool = False,
    ) -> AsyncGenerator[Update, None]:
        """Validate, admit and run one generation; closing this ends all of it."""
        request, metadata = self._reader.generation(
            prompt,
            options,
            context,
            time.perf_counter_ns(),
            parse_special_tokens=parse_special_tokens,
        )
        whole = WholeAnswer(
            options, request.num_choices, request.model, self._settings.max_answer_bytes
        )
        if not is_stream:
            whole.check()
        is_text = isinstance(prompt, str | generation_pb2.TokenIds)
        operation = "text_completion" if is_text else "chat"
        set_attributes(request_attributes(request, operation, is_stream=is_stream))
        num_tokens = len(prompt.ids) if isinstance(prompt, generation_pb2.TokenIds) else None
        admitted = self._admission.reserve(
            tenant=metadata.tenant,
            num_bytes=self._reader.num_bytes(prompt),
            num_tokens=num_tokens,
        )
        with admitted as held, self._answers.share() as share, self._answers.share() as kept:
            if not is_stream:
                whole.reserve(kept)
            settle = partial(self._admission.settle, held)
            generation = Generation(self._upstreams, request, settle, share)
            try:
                async with aclosing(generation.updates(slot)) as updates:
                    async for update in updates:
                        if not is_stream:
                            whole.add(update.num_bytes, kept)
                        yield update
            finally:
                usage = generation.usage()
                add_to_log_line(
                    tenant=metadata.tenant or "",
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                )
                set_attributes(result_attributes(generation, request.model.id))
                if generation.time_to_first_token_ns is not None:
                    self._metrics.first_token(generation.time_to_first_token_ns / 1e9)

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
