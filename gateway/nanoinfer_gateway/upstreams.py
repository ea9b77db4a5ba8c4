"""The services behind the gateway, as the generation core sees them: encode and generate.

Only an engine that is UNAVAILABLE before its first message is replaced by another one; a generation
is never sent twice at the same time.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import grpc
from google.protobuf.message import Message
from nanoinfer.v1 import (
    engine_pb2,
    generation_pb2,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from nanoinfer_common import names
from nanoinfer_common.channels import open_channel
from nanoinfer_common.detokenize import Spelling
from nanoinfer_common.errors import ServiceError, from_rpc_error, unavailable

from nanoinfer_gateway.replicas import Replica, Replicas
from nanoinfer_gateway.vocabulary import Vocabulary

HOP_MARGIN_SECONDS = 0.05
MAX_ATTEMPTS = 3
VOCABULARY_TIMEOUT_SECONDS = 60.0

# a server that stops cancels its calls; our own cancels do not come back as errors
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

Observe = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Call:
    """What every upstream call of one request carries: metadata and deadline.

    `deadline` is in seconds of the monotonic clock; None means that the caller has none.
    """

    metadata: tuple[tuple[str, str], ...] = ()
    deadline: float | None = None

    def timeout(self, cap: float | None = None) -> float | None:
        """Return min(remaining - 50 ms, cap) in seconds; DEADLINE_EXCEEDED once that is spent."""
        if self.deadline is None:
            return cap
        remaining = self.deadline - time.monotonic() - HOP_MARGIN_SECONDS
        if remaining <= 0:
            raise deadline_exceeded()
        return remaining if cap is None else min(remaining, cap)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's ids; `fingerprint` is the tokenizer's, None where the caller gave the ids.

    `is_whole` is false where ids at its beginning were left out.
    """

    tokens: generation_pb2.TokenIds
    fingerprint: bytes | None = None
    tokenize_ns: int = 0
    is_whole: bool = True

    def last(self, count: int) -> Self:
        """Return the prompt with no more than its last `count` ids; 0 keeps all."""
        if not 0 < count < len(self.tokens.ids):
            return self
        kept = generation_pb2.TokenIds(ids=self.tokens.ids[-count:])
        return replace(self, tokens=kept, is_whole=False)


def deadline_exceeded() -> ServiceError:
    """Return DEADLINE_EXCEEDED."""
    return ServiceError(
        grpc.StatusCode.DEADLINE_EXCEEDED, names.DEADLINE_EXCEEDED, "the deadline is over"
    )


class Tokenizer:
    """The tokenizer replicas behind one round-robin channel, whose service config retries."""

    def __init__(self, target: str, timeout_seconds: float, observe: Observe) -> None:
        self.channel = open_channel(target, round_robin=True)
        self._stub = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)
        self._timeout_seconds = timeout_seconds
        self._observe = observe

    async def encode(
        self, text: str, call: Call, *, parse_special_tokens: bool = False
    ) -> EncodedPrompt:
        """Return a text's ids. Raises what the tokenizer raises, or TOKENIZER_UNAVAILABLE."""
        request = tokenizer_pb2.TokenizerServiceEncodeRequest(
            text=text, parse_special_tokens=parse_special_tokens or None
        )
        return await self._encoded(self._stub.Encode, request, call)

    async def render_chat(
        self, messages: Iterable[tokenizer_pb2.ChatMessage], call: Call
    ) -> EncodedPrompt:
        """Return a conversation's ids, as the chat template renders it; raises like `encode`."""
        request = tokenizer_pb2.TokenizerServiceRenderChatRequest(messages=messages)
        return await self._encoded(self._stub.RenderChat, request, call)

    async def vocabulary(self) -> Vocabulary:
        """Fetch the whole vocabulary."""
        request = tokenizer_pb2.TokenizerServiceGetVocabularyRequest()
        tokens: list[bytes] = []
        first_tokens: dict[int, bytes] = {}
        special: set[int] = set()
        byte_ids: set[int] = set()
        last = tokenizer_pb2.TokenizerServiceGetVocabularyResponse()
        with self._errors(Call()):
            async for run in self._stub.GetVocabulary(request, timeout=VOCABULARY_TIMEOUT_SECONDS):
                tokens.extend(run.tokens)
                special.update(run.special_token_ids)
                byte_ids.update(run.byte_token_ids)
                first_tokens.update(run.first_tokens)
                last = run
        spelling = Spelling(
            tuple(tokens), frozenset(byte_ids), first_tokens, last.strip_leading_spaces
        )
        return Vocabulary(last.tokenizer_fingerprint, spelling, frozenset(special))

    async def _encoded(self, method: Any, request: Message, call: Call) -> EncodedPrompt:
        started = time.perf_counter_ns()
        timeout = call.timeout(self._timeout_seconds)
        with self._errors(call):
            response = await method(request, timeout=timeout, metadata=call.metadata)
        elapsed = time.perf_counter_ns() - started
        return EncodedPrompt(response.tokens, response.tokenizer_fingerprint, elapsed)

    async def close(self) -> None:
        """Close the channel and what is under way on it."""
        await self.channel.close(None)

    @contextmanager
    def _errors(self, call: Call) -> Iterator[None]:
        """Time the call and say TOKENIZER_UNAVAILABLE where none answers, or none in time."""
        try:
            with self._observe("tokenizer"):
                yield
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                call.timeout()  # the caller's own deadline is over, unless only the cap was reached
            elif code not in _GONE:
                raise from_rpc_error(error) from error
            raise unavailable(
                names.TOKENIZER_UNAVAILABLE, "no tokenizer answers", retry_after=1.0
            ) from error


class Engines:
    """The engine replicas: picks the least loaded one and goes on to another where it is gone."""

    def __init__(self, replicas: Replicas, observe: Observe) -> None:
        self._replicas = replicas
        self._observe = observe

    async def generate(
        self, request: engine_pb2.EngineServiceGenerateRequest, model: str, call: Call
    ) -> AsyncGenerator[engine_pb2.EngineServiceGenerateResponse, None]:
        """Stream an engine's messages; closing the generator cancels the engine's call at once.

        Raises NO_ENGINE where none serves, ENGINE_LOST where the last one tried goes away, and what
        the engine itself refuses with.
        """
        tried: set[Replica] = set()
        while True:
            replica = self._replicas.pick(model, tried)
            tried.add(replica)
            num_messages = 0
            try:
                async with aclosing(self._stream(replica, request, call)) as messages:
                    async for message in messages:
                        num_messages += 1
                        yield message
                return
            except grpc.aio.AioRpcError as error:
                code = error.code()
                if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise deadline_exceeded() from error
                retryable = code is grpc.StatusCode.UNAVAILABLE and num_messages == 0
                others = len(tried) < MAX_ATTEMPTS and self._replicas.has_other(model, tried)
                if not (retryable and others):
                    raise _engine_error(error) from error

    async def _stream(
        self, replica: Replica, request: engine_pb2.EngineServiceGenerateRequest, call: Call
    ) -> AsyncGenerator[engine_pb2.EngineServiceGenerateResponse, None]:
        timeout = call.timeout()
        with replica.in_flight(), self._observe("engine"):
            rpc = replica.stub.Generate(request, timeout=timeout, metadata=call.metadata)
            try:
                async for message in rpc:
                    yield message
            finally:
                rpc.cancel()


def _engine_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """The engine's own refusal where it gave one; a broken connection is ENGINE_LOST."""
    known = from_rpc_error(error)
    if error.code() in _GONE and known.reason == error.code().name:
        return unavailable(names.ENGINE_LOST, "the engine is gone", retry_after=1.0)
    return known
