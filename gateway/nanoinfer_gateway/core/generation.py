"""One request's flow, decode(generate(encode(prompt))): one object each.

It takes an encoder, a token source and the vocabularies, and does not know where these are.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Protocol

from nanoinfer.v1 import engine_pb2, gateway_pb2, generation_pb2, tokenizer_pb2
from nanoinfer_common import names
from nanoinfer_common.errors import Code, ServiceError, unavailable
from nanoinfer_common.telemetry import record_span

from nanoinfer_gateway.core.answer_bytes import Share, prompt_bytes
from nanoinfer_gateway.core.caller import Caller
from nanoinfer_gateway.core.completions import Completions, Update
from nanoinfer_gateway.core.requests import EncodedPrompt, GenerationRequest, Prompt
from nanoinfer_gateway.core.vocabulary import Vocabulary

# Beyond these the engine's stream is not read until the client reads.
MAX_PENDING_TOKENS = 4096
MAX_PENDING_BYTES = 128 * 1024

Slot = Callable[[], AbstractAsyncContextManager[object]]


class Encoder(Protocol):
    """Turns text and conversations into ids."""

    async def encode(
        self, text: str, caller: Caller, *, parse_special_tokens: bool = False
    ) -> EncodedPrompt:
        """Return a text's ids and the tokenizer's fingerprint."""
        ...

    async def render_chat(
        self, messages: Iterable[tokenizer_pb2.ChatMessage], caller: Caller
    ) -> EncodedPrompt:
        """Return a conversation's ids and the tokenizer's fingerprint."""
        ...


class TokenSource(Protocol):
    """Turns ids into more ids."""

    def generate(
        self, request: engine_pb2.EngineServiceGenerateRequest, model: str, caller: Caller
    ) -> AsyncGenerator[engine_pb2.EngineServiceGenerateResponse, None]:
        """Stream an engine's messages; closing the generator cancels the engine's call."""
        ...


@dataclass(frozen=True)
class Upstreams:
    """What a generation is composed of.

    `vocabulary` is asked with a fingerprint and the EOS ids that must go with it, each or None.
    """

    encoder: Encoder
    engines: TokenSource
    vocabulary: Callable[[bytes | None, frozenset[int] | None], Awaitable[Vocabulary]]

    async def encode(
        self, prompt: Prompt, caller: Caller, *, parse_special_tokens: bool = False
    ) -> EncodedPrompt:
        """Return a prompt's ids, which may be given already."""
        if isinstance(prompt, generation_pb2.TokenIds):
            return EncodedPrompt(prompt)
        if isinstance(prompt, str):
            return await self.encoder.encode(
                prompt, caller, parse_special_tokens=parse_special_tokens
            )
        return await self.encoder.render_chat(prompt, caller)


class Generation:
    """Runs one request. `completions` is None until the prompt is encoded."""

    def __init__(
        self,
        upstreams: Upstreams,
        request: GenerationRequest,
        on_encoded: Callable[[int], None],
        share: Share,
    ) -> None:
        self._upstreams = upstreams
        self._request = request
        self._on_encoded = on_encoded
        self._share = share
        self._taken_bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = self._succeeded = False
        self._reported: generation_pb2.GenerationSummary | None = None
        self._first_token_timings = generation_pb2.Timings()
        self._first_message_time: int | None = None
        self.completions: Completions | None = None

    async def updates(self, slot: Slot) -> AsyncGenerator[Update, None]:
        """Yield what is new, merged, until the summary; closing it ends every upstream call.

        A slot is held while an update is handed out and taken before what piled up is emptied, so
        that more merges the longer one waits for it. Raises ENGINE_LOST_MID_STREAM (metadata
        `outputTokens`) where tokens had come already, and what encoder and engines raise.
        """
        request = self._request
        encoded = await self._upstreams.encode(
            request.prompt, request.caller, parse_special_tokens=request.parse_special_tokens
        )
        prompt = encoded.last(request.options.truncate_prompt_tokens)
        self._on_encoded(len(prompt.tokens.ids))
        fingerprint = prompt.fingerprint or request.model.tokenizer_fingerprint or None
        vocabulary = await self._upstreams.vocabulary(fingerprint, _eos(request.model))
        options = _with_seed(request.options)
        echo = _echo(request, prompt)
        # The first message brings both at once, so no reader can slow them down.
        num_bytes = prompt_bytes(options.response, len(prompt.tokens.ids))
        self._share.reserve(num_bytes + len(echo) * request.num_choices)
        completions = Completions(vocabulary, options, request.num_choices, echo)
        self.completions = completions
        reader = asyncio.create_task(
            self._read(_engine_request(request, options, prompt), completions)
        )
        try:
            ended = False
            while not ended:
                await self._news.wait()
                self._news.clear()
                async with slot():
                    ended = self._ended
                    update = completions.take()
                    self._taken_bytes = update.num_bytes
                    self._room.set()
                    if self._succeeded:
                        update.summary = self._summary(completions, prompt, vocabulary)
                    if update.has_content:
                        yield update
                    self._taken_bytes = 0
                    self._count(completions)
            await reader  # raises what ended the stream, after all that came before it went out
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._record_detokenize(completions)

    async def _read(
        self, request: engine_pb2.EngineServiceGenerateRequest, completions: Completions
    ) -> None:
        """Feed the engine's messages in until its stream ends or a stop string ended all."""
        try:
            await self._read_messages(request, completions)
            if not completions.all_ended:
                raise unavailable(names.ENGINE_LOST, "the engine's stream ended early", 1.0)
            self._succeeded = True
        except ServiceError as error:
            if error.code is not Code.UNAVAILABLE or not completions.num_tokens:
                raise
            raise _lost_mid_stream(completions.num_tokens) from error
        finally:
            self._ended = True
            self._news.set()

    async def _read_messages(
        self, request: engine_pb2.EngineServiceGenerateRequest, completions: Completions
    ) -> None:
        messages = self._upstreams.engines.generate(
            request, self._request.model.id, self._request.caller
        )
        async with aclosing(messages):
            async for message in messages:
                self._first_message_time = self._first_message_time or time.time_ns()
                completions.feed(message)
                self._news.set()
                if message.HasField("first_token_timings"):
                    self._first_token_timings = message.first_token_timings
                if message.HasField("summary"):
                    self._reported = message.summary
                if completions.all_ended and completions.any_cut and self._reported is None:
                    return  # the engine knows nothing of stop strings and would go on
                self._count(completions)
                while completions.has_news and self._is_full(completions):
                    self._room.clear()
                    await self._room.wait()
                    self._count(completions)

    def _count(self, completions: Completions) -> None:
        self._share.set(completions.num_pending_bytes + self._taken_bytes)

    def _is_full(self, completions: Completions) -> bool:
        return (
            completions.num_pending_tokens > MAX_PENDING_TOKENS
            or completions.num_pending_bytes > MAX_PENDING_BYTES
            or self._share.total.is_full
        )

    def _summary(
        self, completions: Completions, prompt: EncodedPrompt, vocabulary: Vocabulary
    ) -> generation_pb2.GenerationSummary:
        """The engine's summary with what only the gateway knows.

        Where a stop string ended the call early the engine reported none: queue and prefill time
        are then those of its first message, decode time is the gateway's.
        """
        timings = generation_pb2.Timings()
        if self._reported is not None:
            timings.CopyFrom(self._reported.timings)
        else:
            timings.CopyFrom(self._first_token_timings)
            timings.decode_ns = completions.decode_ns
        timings.tokenize_ns = prompt.tokenize_ns
        timings.detokenize_ns = completions.detokenize_ns
        timings.total_ns = time.perf_counter_ns() - self._request.arrived_ns
        timings.time_to_first_token_ns = self.time_to_first_token_ns or 0
        return generation_pb2.GenerationSummary(
            usage=self.usage(),
            timings=timings,
            model=self._request.model.id,
            tokenizer_fingerprint=vocabulary.fingerprint,
            request_id=self._request.caller.request_id,
        )

    @property
    def time_to_first_token_ns(self) -> int | None:
        """From the request's arrival to the first token; None until there is one."""
        if self.completions is None or self.completions.first_token_ns is None:
            return None
        return self.completions.first_token_ns - self._request.arrived_ns

    def usage(self) -> generation_pb2.Usage:
        """Return the tokens so far; all zero until the prompt is encoded."""
        if self.completions is None:
            return generation_pb2.Usage()
        return self.completions.usage(self._reported)

    def _record_detokenize(self, completions: Completions) -> None:
        """One span for the whole stream, since one a token would cost more than the work."""
        if self._first_message_time is not None:
            record_span(
                "detokenize",
                self._first_message_time,
                time.time_ns(),
                attributes={
                    "nanoinfer.detokenize.duration": completions.detokenize_ns / 1e9,
                    "nanoinfer.stop.matched": completions.any_cut,
                },
            )


def _eos(model: generation_pb2.ModelInfo) -> frozenset[int] | None:
    """The engine's EOS ids; None where it knows no tokenizer whose EOS it could have taken in."""
    known = model.HasField("tokenizer_fingerprint")
    return frozenset(model.eos_token_ids) if known else None


def _with_seed(options: gateway_pb2.GenerationOptions) -> gateway_pb2.GenerationOptions:
    """Draw the seed here where a stop string may end the engine's call before it tells its own."""
    if not options.stop or options.sampling.HasField("seed"):
        return options
    seeded = gateway_pb2.GenerationOptions()
    seeded.CopyFrom(options)
    seeded.sampling.seed = secrets.randbits(64)
    return seeded


def _echo(request: GenerationRequest, prompt: EncodedPrompt) -> str | Sequence[int]:
    """The prompt as it was given, or the ids to decode where no such text exists."""
    if not request.options.response.echo:
        return ""
    given = request.prompt
    return given if isinstance(given, str) and prompt.is_whole else prompt.tokens.ids


def _engine_request(
    request: GenerationRequest, options: gateway_pb2.GenerationOptions, prompt: EncodedPrompt
) -> engine_pb2.EngineServiceGenerateRequest:
    """The engine's request: the same messages, without what is done here."""
    result = engine_pb2.EngineServiceGenerateRequest(
        prompt=prompt.tokens, request_id=request.caller.request_id
    )
    for name in ("sampling", "stopping", "response", "structured_output"):
        if options.HasField(name):
            getattr(result, name).CopyFrom(getattr(options, name))
    if result.HasField("response"):
        result.response.ClearField("echo")
    for name in ("model", "cache_salt"):
        if options.HasField(name):
            setattr(result, name, getattr(options, name))
    if prompt.fingerprint:
        result.tokenizer_fingerprint = prompt.fingerprint
    result.cancels_at_stop_strings = bool(options.stop)
    return result


def _lost_mid_stream(num_tokens: int) -> ServiceError:
    return ServiceError(
        Code.UNAVAILABLE,
        names.ENGINE_LOST_MID_STREAM,
        f"the engine is gone after {num_tokens} tokens",
        metadata={"outputTokens": str(num_tokens)},
    )
