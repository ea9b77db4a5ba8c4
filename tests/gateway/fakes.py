"""A tokenizer and an engine over real sockets, which keep the contract and do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from nanoinfer.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2_grpc,
    generation_pb2,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from nanoinfer_common.errors import ServiceError, to_status
from nanoinfer_common.server import RunningServer, running
from nanoinfer_gateway.service import GatewayService
from nanoinfer_gateway.settings import GatewaySettings

FINGERPRINT = bytes(range(32))
# ids 0 to 255 are single bytes; then whole words, an id without a token, a special one
WORDS = (b"Hello", b" world", b"STOP", b" STO", b"P now", "é".encode(), "日本".encode())
NO_TOKEN = 256 + len(WORDS)
SPECIAL = NO_TOKEN + 1
BIG = NO_TOKEN + 2
TOKENS = (*(bytes([value]) for value in range(256)), *WORDS, b"", b"<|end|>", b"x" * 200_000)
EngineResponse = engine_pb2.EngineServiceGenerateResponse
Behaviour = Callable[[engine_pb2.EngineServiceGenerateRequest], AsyncIterator[EngineResponse]]


def ids_of(*pieces: bytes | int) -> list[int]:
    """Ids of words where there are such, of single bytes otherwise; an int is an id."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        elif piece in WORDS:
            ids.append(256 + WORDS.index(piece))
        else:
            ids.extend(piece)
    return ids


async def abort(context: Any, error: ServiceError) -> None:
    status = to_status(error, "nanoinfer-fake")
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(error.code, error.message, details)


@dataclass
class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Encodes UTF-8 bytes; `before` runs first in every unary call."""

    fingerprint: bytes = FINGERPRINT
    tokens: Sequence[bytes] = TOKENS
    eos_token_ids: Sequence[int] | None = None
    before: Callable[[Any], Any] | None = None
    calls: list[tuple[str, Any, dict[str, Any], float | None]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def _enter(self, name: str, request: Any, context: Any) -> None:
        metadata = {key: value for key, value in context.invocation_metadata()}
        self.calls.append((name, request, metadata, context.time_remaining()))
        if self.before is not None:
            try:
                await self.before(context)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

    async def Encode(self, request: Any, context: Any) -> Any:
        await self._enter("Encode", request, context)
        return tokenizer_pb2.TokenizerServiceEncodeResponse(
            tokens=generation_pb2.TokenIds(ids=request.text.encode()),
            tokenizer_fingerprint=self.fingerprint,
        )

    async def RenderChat(self, request: Any, context: Any) -> Any:
        await self._enter("RenderChat", request, context)
        text = "".join(
            f"{message.role}:{''.join(part.text for part in message.content)}\n"
            for message in request.messages
        )
        return tokenizer_pb2.TokenizerServiceRenderChatResponse(
            tokens=generation_pb2.TokenIds(ids=text.encode()),
            tokenizer_fingerprint=self.fingerprint,
        )

    async def GetVocabulary(self, request: Any, context: Any) -> Any:
        self.calls.append(("GetVocabulary", request, {}, None))
        for first in range(0, len(self.tokens), 100):
            run = self.tokens[first : first + 100]
            yield tokenizer_pb2.TokenizerServiceGetVocabularyResponse(
                first_token_id=first,
                tokens=run,
                special_token_ids=[SPECIAL] if first <= SPECIAL < first + len(run) else [],
                vocab_size=len(self.tokens),
                tokenizer_fingerprint=self.fingerprint,
                eos_token_ids=None
                if self.eos_token_ids is None
                else generation_pb2.TokenIds(ids=self.eos_token_ids),
            )

    def named(self, name: str) -> list[Any]:
        return [request for called, request, _, _ in self.calls if called == name]


def model_info(name: str = "fake", **more: Any) -> generation_pb2.ModelInfo:
    features = [
        generation_pb2.FEATURE_LOGPROBS,
        generation_pb2.FEATURE_MULTIPLE_CHOICES,
    ]
    values: dict[str, Any] = {
        "id": name,
        "max_model_len": 1000,
        "vocab_size": len(TOKENS),
        "default_sampling": generation_pb2.SamplingParams(n=1, temperature=1),
        "features": features,
        "tokenizer_fingerprint": FINGERPRINT,
        **more,
    }
    return generation_pb2.ModelInfo(**values)


def finish(index: int = 0, *, eos: bool = True, seed: int = 7) -> generation_pb2.ChoiceFinish:
    if eos:
        reason, match = generation_pb2.FINISH_REASON_STOP, generation_pb2.StopMatch(eos=True)
        return generation_pb2.ChoiceFinish(index=index, reason=reason, stop_match=match, seed=seed)
    return generation_pb2.ChoiceFinish(
        index=index, reason=generation_pb2.FINISH_REASON_LENGTH, seed=seed
    )


def summary(num_prompt: int, num_completion: int) -> generation_pb2.GenerationSummary:
    return generation_pb2.GenerationSummary(
        usage=generation_pb2.Usage(prompt_tokens=num_prompt, completion_tokens=num_completion),
        timings=generation_pb2.Timings(queue_ns=11, prefill_ns=22, decode_ns=33, total_ns=99),
        model="fake",
        request_id="engine",
    )


def delta(
    ids: Sequence[int], index: int = 0, logprobs: Iterable[generation_pb2.TokenLogprob] = ()
) -> engine_pb2.TokenDelta:
    return engine_pb2.TokenDelta(index=index, token_ids=ids, logprobs=logprobs)


def tell(ids: Sequence[int], *, chunk: int = 1, pause: float = 0.0) -> Behaviour:
    """Every completion produces these ids, `chunk` at a time, then ends by EOS."""

    async def behave(
        request: engine_pb2.EngineServiceGenerateRequest,
    ) -> AsyncIterator[EngineResponse]:
        num_choices = request.sampling.n or 1
        yield EngineResponse(
            prompt_info=generation_pb2.PromptInfo(prompt_tokens=len(request.prompt.ids))
        )
        for start in range(0, len(ids), chunk):
            if pause:
                await asyncio.sleep(pause)
            run = ids[start : start + chunk]
            yield EngineResponse(deltas=[delta(run, index) for index in range(num_choices)])
        total = num_choices * (len(ids) + 1)
        yield EngineResponse(
            finishes=[finish(index, seed=7 + index) for index in range(num_choices)],
            summary=summary(len(request.prompt.ids), total),
        )

    return behave


def endless(pause: float = 0.005, token_id: int = ord("a")) -> Behaviour:
    """Produces one id again and again until it is cancelled."""

    async def behave(
        request: engine_pb2.EngineServiceGenerateRequest,
    ) -> AsyncIterator[EngineResponse]:
        yield EngineResponse(
            prompt_info=generation_pb2.PromptInfo(prompt_tokens=len(request.prompt.ids))
        )
        while True:
            yield EngineResponse(deltas=[delta([token_id])])
            await asyncio.sleep(pause)

    return behave


@dataclass
class FakeEngine(engine_pb2_grpc.EngineServiceServicer):
    """Answers as `behaviour` says, which may raise `ServiceError`; `report` changes its load."""

    behaviour: Behaviour = field(default_factory=lambda: tell(ids_of(b"Hello", b" world")))
    model: generation_pb2.ModelInfo = field(default_factory=model_info)
    load: engine_pb2.EngineLoad = field(
        default_factory=lambda: engine_pb2.EngineLoad(
            admission_state=engine_pb2.ADMISSION_STATE_OPEN
        )
    )
    requests: list[engine_pb2.EngineServiceGenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    remaining: list[float] = field(default_factory=list)
    before: Callable[[Any], Any] | None = None
    num_running: int = 0
    num_reports: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.metadata.append({key: value for key, value in context.invocation_metadata()})
        self.remaining.append(context.time_remaining())
        self.num_running += 1
        try:
            if self.before is not None:
                await self.before(context)
            async for message in self.behaviour(request):
                await context.write(message)
        except ServiceError as error:
            await abort(context, error)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.num_running -= 1

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return engine_pb2.EngineServiceGetModelInfoResponse(model=self.model)

    async def WatchLoad(self, request: Any, context: Any) -> Any:
        while True:
            self.changed.clear()
            yield engine_pb2.EngineServiceWatchLoadResponse(load=self.load)
            self.num_reports += 1
            await self.changed.wait()

    def report(self, **load: Any) -> None:
        load.setdefault("admission_state", engine_pb2.ADMISSION_STATE_OPEN)
        self.load = engine_pb2.EngineLoad(**load)
        self.changed.set()


@asynccontextmanager
async def serving(servicer: Any, address: str = "127.0.0.1:0") -> AsyncIterator[FakeServer]:
    server = grpc.aio.server()
    if isinstance(servicer, FakeTokenizer):
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, server)
    else:
        engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield FakeServer(server, f"127.0.0.1:{port}")
    finally:
        await server.stop(0)


@dataclass(frozen=True)
class FakeServer:
    """A fake that listens; `kill` drops its connections as a dying process does."""

    server: grpc.aio.Server
    address: str

    async def kill(self) -> None:
        await self.server.stop(0)


@dataclass(frozen=True)
class Gateway:
    """A running gateway and a stub that talks to it."""

    stub: Any
    server: RunningServer
    channel: grpc.aio.Channel


@asynccontextmanager
async def gateway(
    tokenizers: Sequence[str], engines: Sequence[str], **settings: Any
) -> AsyncIterator[Gateway]:
    values = {"port": 0, "metrics_port": None, "drain_seconds": 0.5, **settings}
    built = GatewaySettings(tokenizer=tuple(tokenizers), engine=tuple(engines), **values)
    async with (
        running(partial(GatewayService, built), built) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        serving_now = generation_pb2.SERVER_STATE_SERVING
        await eventually(lambda: server.status.state == serving_now, 60)
        yield Gateway(gateway_pb2_grpc.GatewayServiceStub(channel), server, channel)


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until the condition holds; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
