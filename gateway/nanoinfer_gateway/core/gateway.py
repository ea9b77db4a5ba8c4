"""The gateway without a transport: `Gateway.generate(prompt, options, caller)` gives updates."""

from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from functools import partial

from nanoinfer.v1 import gateway_pb2, generation_pb2
from nanoinfer_common.telemetry import add_to_log_line, set_attributes

from nanoinfer_gateway.core.admission import Admission, Bounds
from nanoinfer_gateway.core.answer_bytes import AnswerBytes, WholeAnswer
from nanoinfer_gateway.core.caller import Caller
from nanoinfer_gateway.core.catalogue import list_page
from nanoinfer_gateway.core.collecting import Answer, collect
from nanoinfer_gateway.core.completions import Update
from nanoinfer_gateway.core.generation import Generation, Slot, Upstreams
from nanoinfer_gateway.core.metrics import GatewayMetrics
from nanoinfer_gateway.core.requests import GenerationRequest, Models, Prompt, RequestReader
from nanoinfer_gateway.core.telemetry import request_attributes, result_attributes


@dataclass(frozen=True)
class Sizes:
    """Most bytes of one prompt, of one whole answer, and of all answers in memory."""

    max_prompt_bytes: int
    max_answer_bytes: int
    max_buffered_bytes: int


class Gateway:
    """The operations that every face offers. One event loop owns it.

    `parse_special_tokens` reads the text of control tokens in a prompt's text as the tokens. All
    raise ServiceError: INVALID_ARGUMENT and NOT_FOUND for the request itself, RESOURCE_EXHAUSTED
    where admission refuses, and what the upstreams raise.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        models: Models,
        bounds: Bounds,
        sizes: Sizes,
        metrics: GatewayMetrics,
    ) -> None:
        self.admission = Admission(bounds, metrics.rejected)
        self.metrics = metrics
        self._upstreams = upstreams
        self._models = models
        self._reader = RequestReader(models, sizes.max_prompt_bytes)
        self._answers = AnswerBytes(sizes.max_buffered_bytes)
        self._max_answer_bytes = sizes.max_answer_bytes

    def generate(
        self,
        prompt: Prompt,
        options: gateway_pb2.GenerationOptions,
        caller: Caller,
        slot: Slot = nullcontext,
        *,
        parse_special_tokens: bool = False,
    ) -> AsyncGenerator[Update, None]:
        """Stream a prompt's completions; closing the stream ends every upstream call.

        A slot is held while an update is handed out: what piles up before it is free is merged.
        """
        request = self._reader.generation(
            prompt, options, caller, parse_special_tokens=parse_special_tokens
        )
        set_attributes(request_attributes(request, is_stream=True))
        return self._updates(request, slot)

    async def answer(
        self,
        prompt: Prompt,
        options: gateway_pb2.GenerationOptions,
        caller: Caller,
        *,
        parse_special_tokens: bool = False,
    ) -> Answer:
        """Return a prompt's completions at once: the same stream, collected and bounded."""
        request = self._reader.generation(
            prompt, options, caller, parse_special_tokens=parse_special_tokens
        )
        whole = WholeAnswer(options, request.num_choices, request.model, self._max_answer_bytes)
        whole.check()
        set_attributes(request_attributes(request, is_stream=False))
        return await collect(self._updates(request, nullcontext, whole))

    async def count_tokens(
        self,
        prompt: Prompt,
        caller: Caller,
        model: str | None = None,
        *,
        parse_special_tokens: bool = False,
    ) -> int:
        """Count the tokens of a text or a conversation; a model is checked for being served."""
        num_bytes = self._reader.prompt_bytes(
            prompt, model, parse_special_tokens=parse_special_tokens
        )
        with self.admission.reserve(tenant=caller.tenant, num_bytes=num_bytes):
            encoded = await self._upstreams.encode(
                prompt, caller, parse_special_tokens=parse_special_tokens
            )
        return len(encoded.tokens.ids)

    def list_models(
        self, page_size: int, page_token: str
    ) -> tuple[list[generation_pb2.ModelInfo], str]:
        """Return a page of the served models and the next page's token or ""."""
        return list_page(self._models.models(), page_size, page_token)

    def model(self, name: str | None) -> generation_pb2.ModelInfo:
        """Return a model's description; None means the served one."""
        return self._models.model(name)

    async def _updates(
        self, request: GenerationRequest, slot: Slot, whole: WholeAnswer | None = None
    ) -> AsyncGenerator[Update, None]:
        """Admit and run a request; `whole` counts an answer that is collected."""
        admitted = self.admission.reserve(
            tenant=request.caller.tenant,
            num_bytes=request.num_bytes,
            num_tokens=request.num_prompt_tokens,
        )
        with admitted as held, self._answers.share() as share, self._answers.share() as kept:
            if whole is not None:
                whole.reserve(kept)
            settle = partial(self.admission.settle, held)
            generation = Generation(self._upstreams, request, settle, share)
            try:
                async with aclosing(generation.updates(slot)) as updates:
                    async for update in updates:
                        if whole is not None:
                            whole.add(update.num_bytes, kept)
                        yield update
            finally:
                self._report(generation, request)

    def _report(self, generation: Generation, request: GenerationRequest) -> None:
        """Tell log, trace and metrics the result so far, also where the request ended early."""
        usage = generation.usage()
        add_to_log_line(
            tenant=request.caller.tenant or "",
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )
        set_attributes(result_attributes(generation, request.model.id))
        if generation.time_to_first_token_ns is not None:
            self.metrics.first_token(generation.time_to_first_token_ns / 1e9)
