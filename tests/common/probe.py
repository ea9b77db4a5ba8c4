"""A service whose handlers end the way the request's bytes say, and a server around it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from nanoinfer_common import errors, names
from nanoinfer_common.server import ServiceStatus
from prometheus_client import CollectorRegistry

FULL_NAME = "nanoinfer.test.Probe"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Panic(BaseException):
    """Stands for a panic of native code, which is no Exception."""


class ProbeService:
    """Handlers of all four kinds, each under its kind's name; `events` tells what they saw."""

    name = "nanoinfer-probe"
    full_name = FULL_NAME

    def __init__(self, status: ServiceStatus) -> None:
        self.status = status
        self.registry = CollectorRegistry()
        self.events: list[str] = []
        self.release = asyncio.Event()
        self.running = 0
        self.num_waits = 0
        self.peers: set[str] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        handlers = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self.stream),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self.collect),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self.both),
            "written": grpc.unary_stream_rpc_method_handler(self.write),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(self.info),
            "WatchLoad": grpc.unary_stream_rpc_method_handler(self.watch),
        }
        generic = grpc.method_handlers_generic_handler(FULL_NAME, handlers)
        server.add_generic_rpc_handlers((generic,))

    async def start(self) -> None:
        self.events.append("start")

    async def drain(self, seconds: float) -> None:
        self.events.append("drain")

    async def stop(self) -> None:
        self.events.append("stop")

    async def unary(self, request: bytes, context: Any) -> bytes:
        self.peers.add(context.peer())
        await self.act(request, context)
        return request

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            yield b"first"
            await self.act(request, context)
            yield request
        finally:
            self.running -= 1
            self.events.append("closed")

    async def write(self, request: bytes, context: Any) -> None:
        await context.write(b"first")
        await self.act(request, context)
        await context.write(request)

    async def collect(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        parts = [part async for part in requests]
        await self.act(parts[-1], context)
        return b"".join(parts)

    async def both(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for part in requests:
            await self.act(part, context)
            yield part

    async def info(self, request: bytes, context: Any) -> bytes:
        return self.status.info().SerializeToString()

    async def watch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        while True:
            yield b"load"
            await asyncio.sleep(0.05)

    async def act(self, request: bytes, context: Any) -> None:
        """Ends the call as `request` says; other requests are answered."""
        match request:
            case b"invalid":
                violation = errors.Violation("sampling.top_p", "must be more than 0")
                raise errors.invalid(names.INVALID_SAMPLING_PARAMS, "bad top_p", violation)
            case b"exhausted":
                raise errors.exhausted(names.QUEUE_FULL, "full", 1.5)
            case b"unavailable":
                raise errors.unavailable(names.NO_ENGINE, "none")
            case b"not found":
                raise errors.not_found_model("gpt")
            case b"exception":
                raise ValueError("a secret")
            case b"panic":
                raise Panic("a secret")
            case b"abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "lost")
            case b"inner cancel":
                task = asyncio.ensure_future(asyncio.sleep(10))
                task.cancel()
                await task
            case b"slow":
                await asyncio.sleep(1)
            case b"wait":
                self.num_waits += 1
                await self.release.wait()
            case _:
                self.events.append(request.decode())


async def one(request: bytes) -> AsyncIterator[bytes]:
    """A request stream of one message."""
    yield request


async def call(channel: grpc.aio.Channel, method: str, request: bytes, **options: Any) -> Any:
    """Calls a method of the probe, reads everything, and returns the finished call."""
    kind = method if method in KINDS else "unary_stream"
    multicallable: Any = getattr(channel, kind)(f"/{FULL_NAME}/{method}")
    argument = one(request) if kind.startswith("stream") else request
    running = multicallable(argument, **options)
    if kind.endswith("unary"):
        await running
    else:
        async for _ in running:
            pass
    return running
