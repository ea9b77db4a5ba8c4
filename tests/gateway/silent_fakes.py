"""Engines and tokenizers that show signs of life until they are frozen; a line that may be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer.v1 import engine_pb2, tokenizer_pb2_grpc

from tests.gateway.fakes import FakeEngine, FakeServer, FakeTokenizer

BEAT_SECONDS = 0.05
SILENCE_SECONDS = 0.6


@dataclass
class BeatingEngine(FakeEngine):
    """Reports its load all the time, until `thawed` is cleared; calls wait for it, too."""

    thawed: asyncio.Event = field(default_factory=asyncio.Event)
    num_watchers: int = 0

    def __post_init__(self) -> None:
        self.thawed.set()

    async def WatchLoad(self, request: Any, context: Any) -> Any:
        self.num_watchers += 1
        while True:
            await self.thawed.wait()
            yield engine_pb2.EngineServiceWatchLoadResponse(
                load=self.load, max_interval_ms=int(BEAT_SECONDS * 1000)
            )
            self.num_reports += 1
            await asyncio.sleep(BEAT_SECONDS)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.num_running += 1
        try:
            await self.thawed.wait()
            async for message in self.behaviour(request):
                await self.thawed.wait()
                await context.write(message)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.num_running -= 1


@dataclass
class BeatingTokenizer(FakeTokenizer):
    """Answers health checks, until `thawed` is cleared; calls wait for it, too."""

    thawed: asyncio.Event = field(default_factory=asyncio.Event)
    num_checks: int = 0
    is_serving: bool = True

    def __post_init__(self) -> None:
        self.thawed.set()
        self.before = self._thawed

    async def _thawed(self, context: Any) -> None:
        await self.thawed.wait()

    async def Check(self, request: Any, context: Any) -> Any:
        await self.thawed.wait()
        self.num_checks += 1
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if self.is_serving else statuses.NOT_SERVING
        return statuses(status=status)


class Health(health_pb2_grpc.HealthServicer):
    def __init__(self, tokenizer: BeatingTokenizer) -> None:
        self.Check: Any = tokenizer.Check


@asynccontextmanager
async def serving_beating(tokenizer: BeatingTokenizer) -> AsyncIterator[FakeServer]:
    """A tokenizer with a health service."""
    server = grpc.aio.server()
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(tokenizer, server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(tokenizer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield FakeServer(server, f"127.0.0.1:{port}")
    finally:
        tokenizer.thawed.set()
        await server.stop(0)


class Line:
    """A TCP line to `upstream` that swallows every byte while it is cut, and closes nothing.

    What was swallowed is gone: connections of before stay dead when the line is whole again.
    """

    def __init__(self, upstream: str) -> None:
        self.address = ""
        self.num_connections = 0
        self._upstream = upstream
        self._dead: set[int] = set()
        self._is_cut = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    def cut(self) -> None:
        self._is_cut = True
        self._dead = set(range(self.num_connections + 1))

    def mend(self) -> None:
        self._is_cut = False
        self._dead = set(range(self.num_connections + 1))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        number = self.num_connections
        host, _, port = self._upstream.rpartition(":")
        there = await asyncio.open_connection(host, int(port))
        self._writers += [writer, there[1]]
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._copy(number, source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(
        self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if not self._is_cut and number not in self._dead:
                    sink.write(data)
        if not self._is_cut and number not in self._dead:
            sink.close()

    @classmethod
    @asynccontextmanager
    async def to(cls, upstream: str) -> AsyncIterator[Line]:
        line = cls(upstream)
        server = await asyncio.start_server(line._connected, "127.0.0.1", 0)
        line.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield line
        finally:
            server.close()
            for task in line._tasks:
                task.cancel()
            await asyncio.gather(*line._tasks, return_exceptions=True)
            for writer in line._writers:
                writer.transport.abort()
            await asyncio.sleep(0)
