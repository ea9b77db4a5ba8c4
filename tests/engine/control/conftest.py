"""An engine service in this event loop, with a fake runner or a tiny real model behind it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_common.server import RunningServer, ServiceStatus, running
from nanoinfer_engine.server.service import EngineService, LoadRunner
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_engine.step.runner import ModelRunner

from tests.engine.fakes import EOS, FakeRunner
from tests.engine.tiny_checkpoints import make_checkpoint

Message = engine_pb2.EngineServiceGenerateResponse


@dataclass
class Answer:
    """A whole stream, put together."""

    messages: list[Message]

    def tokens(self, index: int = 0) -> list[int]:
        return [i for m in self.messages for d in m.deltas if d.index == index for i in d.token_ids]

    @property
    def finishes(self) -> dict[int, pb.ChoiceFinish]:
        return {finish.index: finish for m in self.messages for finish in m.finishes}

    @property
    def summary(self) -> pb.GenerationSummary:
        return self.messages[-1].summary


@dataclass
class Refusal:
    """How a call ended badly: code, ErrorInfo and the other details."""

    code: grpc.StatusCode
    message: str
    info: error_details_pb2.ErrorInfo
    fields: list[str]
    retry_seconds: float | None


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    seconds = None
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        for known in (info, bad, retry):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
        if detail.Is(retry.DESCRIPTOR):
            seconds = retry.retry_delay.ToTimedelta().total_seconds()
    fields = [violation.field for violation in bad.field_violations]
    return Refusal(error.code(), error.details() or "", info, fields, seconds)


@dataclass
class Engine:
    """A running service and a stub for it."""

    server: RunningServer
    service: EngineService
    stub: engine_pb2_grpc.EngineServiceAsyncStub
    runner: Any = None

    async def generate(
        self, prompt: list[int] | None = None, *, metadata: Any = None, **fields: Any
    ) -> Answer:
        return Answer([m async for m in self.call(prompt, metadata=metadata, **fields)])

    def call(
        self, prompt: list[int] | None = None, *, metadata: Any = None, **fields: Any
    ) -> grpc.aio.UnaryStreamCall[Any, Message]:
        ids = [11, 12, 13] if prompt is None else prompt
        request = engine_pb2.EngineServiceGenerateRequest(prompt=pb.TokenIds(ids=ids), **fields)
        return self.stub.Generate(request, metadata=metadata, timeout=fields.pop("timeout", 120))

    async def refused(self, call: Awaitable[Any]) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        return refusal(raised.value)

    async def load(self) -> engine_pb2.EngineLoad:
        return (await self.stub.GetLoad(engine_pb2.EngineServiceGetLoadRequest())).load

    async def until(
        self, condition: Callable[[engine_pb2.EngineLoad], bool], seconds: float = 60.0
    ) -> engine_pb2.EngineLoad:
        end = time.monotonic() + seconds
        while not condition(load := await self.load()):
            assert time.monotonic() < end, load
            await asyncio.sleep(0.005)
        return load

    async def idle(self, seconds: float = 60.0) -> None:
        load = await self.until(
            lambda load: not load.running_requests + load.waiting_requests, seconds
        )
        assert load.kv_cache_usage == 0


@asynccontextmanager
async def start_engine(load_runner: LoadRunner, **settings: Any) -> AsyncIterator[Engine]:
    made: list[EngineService] = []

    def factory(status: ServiceStatus) -> EngineService:
        made.append(EngineService(chosen, status, load_runner))
        return made[-1]

    chosen = EngineSettings(**{"port": 0, "metrics_port": None, "drain_seconds": 0.2, **settings})
    async with (
        running(factory, chosen) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Engine(server, made[0], engine_pb2_grpc.EngineServiceStub(channel))


StartFake = Callable[..., Any]


@pytest.fixture
def start_fake(tmp_path: Path) -> StartFake:
    """Starts a service on a fake runner; settings as keyword arguments."""

    @asynccontextmanager
    async def start(runner: FakeRunner | None = None, **settings: Any) -> AsyncIterator[Engine]:
        used = runner or FakeRunner()
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
        small = {"model": tmp_path, "model_name": "fake", "block_size": used.block_size}
        small |= {"max_batch_requests": 4, "max_batch_tokens": 16, "max_waiting_requests": 8}
        async with start_engine(lambda config, progress: used, **(small | settings)) as engine:
            engine.runner = used
            try:
                yield engine
            finally:
                used.gate.set()

    return start


@pytest.fixture
async def fake(start_fake: StartFake) -> AsyncIterator[Engine]:
    async with start_fake() as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama2", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
async def tiny(tiny_model: Path) -> AsyncIterator[Engine]:
    """A real model: two threads, 4 MiB of KV cache."""
    async with start_engine(
        ModelRunner, model=tiny_model, threads=1, kv_cache_memory="4MiB", max_batch_tokens=64
    ) as engine:
        yield engine
