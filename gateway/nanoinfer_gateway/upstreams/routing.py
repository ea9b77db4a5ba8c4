"""The services behind the gateway, as the generation core sees them: encode and generate.

Only an engine that is UNAVAILABLE or silent before its first message is replaced by another one,
and its call is cancelled then; nothing that was delivered is generated again.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.message import Message
from nanoinfer.v1 import (
    engine_pb2,
    tokenizer_pb2,
)
from nanoinfer_common import names
from nanoinfer_common.detokenize import Spelling
from nanoinfer_common.errors import ServiceError, from_rpc_error, internal, unavailable

from nanoinfer_gateway.core.caller import Caller, deadline_exceeded
from nanoinfer_gateway.core.requests import EncodedPrompt
from nanoinfer_gateway.core.vocabulary import Vocabulary
from nanoinfer_gateway.upstreams.fleet import Connection, SilentError
from nanoinfer_gateway.upstreams.replicas import EngineReplica, Replicas
from nanoinfer_gateway.upstreams.tokenizers import Tokenizers

MAX_ATTEMPTS = 3
MAX_TOKENIZER_ATTEMPTS = 4
BACKOFF_SECONDS = 0.05
VOCABULARY_TIMEOUT_SECONDS = 60.0

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
# a server that stops cancels its calls; our own cancels do not come back as errors
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")
Observe = Callable[[str], AbstractContextManager[None]]


class Tokenizer:
    """The tokenizers as one: a call that one of them leaves unanswered goes to another."""

    def __init__(self, replicas: Tokenizers, timeout_seconds: float, observe: Observe) -> None:
        self._replicas = replicas
        self._timeout_seconds = timeout_seconds
        self._observe = observe

    async def encode(
        self, text: str, caller: Caller, *, parse_special_tokens: bool = False
    ) -> EncodedPrompt:
        """Return a text's ids. Raises what the tokenizer raises, or TOKENIZER_UNAVAILABLE."""
        request = tokenizer_pb2.TokenizerServiceEncodeRequest(
            text=text, parse_special_tokens=parse_special_tokens or None
        )
        return await self._encoded("Encode", request, caller)

    async def render_chat(
        self, messages: Iterable[tokenizer_pb2.ChatMessage], caller: Caller
    ) -> EncodedPrompt:
        """Return a conversation's ids, as the chat template renders it; raises like `encode`."""
        request = tokenizer_pb2.TokenizerServiceRenderChatRequest(messages=messages)
        return await self._encoded("RenderChat", request, caller)

    async def vocabulary(self) -> Vocabulary:
        """Fetch the whole vocabulary."""
        return await self._ask(_fetch_vocabulary, Caller(), VOCABULARY_TIMEOUT_SECONDS)

    async def _encoded(self, method: str, request: Message, caller: Caller) -> EncodedPrompt:
        async def encode(stub: Any, timeout: float | None) -> Any:
            return await getattr(stub, method)(request, timeout=timeout, metadata=_metadata(caller))

        started = time.perf_counter_ns()
        response = await self._ask(encode, caller, self._timeout_seconds)
        elapsed = time.perf_counter_ns() - started
        return EncodedPrompt(response.tokens, response.tokenizer_fingerprint, elapsed)

    async def _ask(
        self, work: Callable[[Any, float | None], Awaitable[Answer]], caller: Caller, cap: float
    ) -> Answer:
        """Make an idempotent call to a tokenizer, and to others where that one does not answer.

        A tokenizer that is gone or silent is replaced, at most MAX_TOKENIZER_ATTEMPTS in all; one
        that takes longer than `cap` is replaced once, because the request may be what is slow.
        """
        tried: set[Connection] = set()
        last: Exception | None = None
        num_timeouts = 0
        for attempt in range(MAX_TOKENIZER_ATTEMPTS):
            replica = self._replicas.pick(tried)
            connection = replica.connection
            if connection in tried:
                await asyncio.sleep(random.uniform(0.5, 1) * BACKOFF_SECONDS * 2**attempt)
            tried.add(connection)
            timeout = caller.timeout(cap)
            has_other = partial(self._replicas.has_other, tried)
            try:
                with (
                    self._observe("tokenizer"),
                    connection.in_flight(),
                    self._replicas.movable(connection, has_other),
                ):
                    return await work(replica.stub, timeout)
            except SilentError as error:
                last = error
            except grpc.aio.AioRpcError as error:
                last, code = error, error.code()
                if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                    caller.timeout()  # raises where the caller's own deadline is over
                    num_timeouts += 1
                    if num_timeouts > 1 or not has_other():
                        break
                elif code not in _GONE:
                    raise _own_refusal(error) from error
        message = "no tokenizer answers"
        raise unavailable(names.TOKENIZER_UNAVAILABLE, message, retry_after=1.0) from last


async def _fetch_vocabulary(stub: Any, timeout: float | None) -> Vocabulary:
    request = tokenizer_pb2.TokenizerServiceGetVocabularyRequest()
    tokens: list[bytes] = []
    first_tokens: dict[int, bytes] = {}
    special: set[int] = set()
    byte_ids: set[int] = set()
    last = tokenizer_pb2.TokenizerServiceGetVocabularyResponse()
    runs = stub.GetVocabulary(request, timeout=timeout)
    try:
        async for run in runs:
            tokens.extend(run.tokens)
            special.update(run.special_token_ids)
            byte_ids.update(run.byte_token_ids)
            first_tokens.update(run.first_tokens)
            last = run
    finally:
        runs.cancel()  # gRPC does not, where its caller is cancelled while the request is sent
    spelling = Spelling(tuple(tokens), frozenset(byte_ids), first_tokens, last.strip_leading_spaces)
    eos = frozenset(last.eos_token_ids.ids) if last.HasField("eos_token_ids") else None
    return Vocabulary(last.tokenizer_fingerprint, spelling, frozenset(special), eos)


class Engines:
    """The engine replicas: picks the least loaded one and goes on to another where it is gone."""

    def __init__(self, replicas: Replicas, observe: Observe) -> None:
        self._replicas = replicas
        self._observe = observe

    async def generate(
        self, request: engine_pb2.EngineServiceGenerateRequest, model: str, caller: Caller
    ) -> AsyncGenerator[engine_pb2.EngineServiceGenerateResponse, None]:
        """Stream an engine's messages; closing the generator cancels the engine's call at once.

        Raises NO_ENGINE where none serves, ENGINE_LOST where the last one tried goes away, and what
        the engine itself refuses with.
        """
        tried: set[Connection] = set()

        def has_other() -> bool:
            return len(tried) < MAX_ATTEMPTS and self._replicas.has_other(model, tried)

        while True:
            replica = self._replicas.pick(model, tried)
            tried.add(replica.connection)
            num_messages = 0
            try:
                stream = self._stream(replica, request, caller, has_other)
                async with aclosing(stream) as messages:
                    async for message in messages:
                        num_messages += 1
                        yield message
                return
            except SilentError:
                continue  # before the first message, and there is another
            except grpc.aio.AioRpcError as error:
                code = error.code()
                if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise deadline_exceeded() from error
                retryable = code is grpc.StatusCode.UNAVAILABLE and num_messages == 0
                if not (retryable and has_other()):
                    raise _engine_error(error) from error

    async def _stream(
        self,
        replica: EngineReplica,
        request: engine_pb2.EngineServiceGenerateRequest,
        caller: Caller,
        has_other: Callable[[], bool],
    ) -> AsyncGenerator[engine_pb2.EngineServiceGenerateResponse, None]:
        timeout, connection = caller.timeout(), replica.connection
        with connection.in_flight(), self._observe("engine"):
            rpc: Any = replica.stub.Generate(request, timeout=timeout, metadata=_metadata(caller))
            try:
                with self._replicas.movable(connection, has_other):
                    message = await rpc.read()
                while message is not _EOF:
                    yield message
                    message = await rpc.read()
            finally:
                rpc.cancel()


def _metadata(caller: Caller) -> tuple[tuple[str, str], ...]:
    """Return the caller as metadata of an upstream's call."""
    pairs = ((names.REQUEST_ID, caller.request_id), (names.PRIORITY, str(caller.priority)))
    return pairs if caller.tenant is None else (*pairs, (names.TENANT, caller.tenant))


def _engine_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """The engine's own refusal where it gave one; a broken connection is ENGINE_LOST."""
    known = from_rpc_error(error)
    if error.code() in _GONE and known.reason == error.code().name:
        return unavailable(names.ENGINE_LOST, "the engine is gone", retry_after=1.0)
    return _own_refusal(error)


def _own_refusal(error: grpc.aio.AioRpcError) -> ServiceError:
    """Return what the service refused with; INTERNAL for a status that is gRPC's and not ours.

    The latter's text names addresses and classes: it goes to the log alone.
    """
    known = from_rpc_error(error)
    if known.reason in names.REASONS and known.reason != names.INTERNAL:
        return known
    log.error("an upstream failed", code=error.code().name, details=error.details())
    return internal()
