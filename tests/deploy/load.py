"""Steady load on gateways through the client library, counted stream by stream."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nanoinfer.aio import AsyncClient

NUM_CLIENTS = 8


@dataclass
class Load:
    """`num_streams` streams at any time, each replaced when it ends, until `stop`."""

    target: str
    num_streams: int
    max_tokens: int
    num_open: int = 0
    completed: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        asyncio.run(self._run())

    def stop(self) -> None:
        self._stopping.set()

    def await_completed(self, count: int, seconds: float = 90) -> None:
        """Waits until `count` more streams have completed; fails at the first one that fails."""
        goal, end = self.completed + count, time.monotonic() + seconds
        while self.completed < goal:
            assert not self.failures, self.failures[:3]
            assert time.monotonic() < end, f"{self.completed} of {goal} completed"
            time.sleep(0.02)

    def await_flowing(self, num_open: int, seconds: float = 90) -> None:
        """Waits until this many of the streams in flight are in the middle of their answers."""
        end = time.monotonic() + seconds
        while self.num_open < num_open:
            assert not self.failures, self.failures[:3]
            assert time.monotonic() < end, f"{self.num_open} of {num_open} open"
            time.sleep(0.005)

    async def _run(self) -> None:
        clients = [AsyncClient(self.target, timeout=120) for _ in range(NUM_CLIENTS)]
        workers = [self._work(clients[n % NUM_CLIENTS], n) for n in range(self.num_streams)]
        await asyncio.gather(*workers)
        await asyncio.gather(*[client.close() for client in clients])

    async def _work(self, client: AsyncClient, number: int) -> None:
        while not self._stopping.is_set():
            await self._stream(client, number)

    async def _stream(self, client: AsyncClient, number: int) -> None:
        started, is_open = time.monotonic(), False
        try:
            stream = client.stream(
                f"What is number {number}?", max_tokens=self.max_tokens, ignore_eos=True
            )
            async for _ in stream:
                if not is_open:
                    is_open = True
                    self.num_open += 1
            completion = await stream.result()
            assert completion.usage is not None
            assert completion.usage.completion_tokens == self.max_tokens
            self.completed += 1
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
        finally:
            self.num_open -= is_open
            self.slowest = max(self.slowest, time.monotonic() - started)


@contextmanager
def running_load(target: str, num_streams: int, max_tokens: int) -> Iterator[Load]:
    """Runs the load in a thread; every stream has ended on exit."""
    load = Load(target, num_streams, max_tokens)
    thread = threading.Thread(target=load.run)
    thread.start()
    try:
        yield load
    finally:
        load.stop()
        thread.join(timeout=120)
        assert not thread.is_alive()


class Switch:
    """A Service's virtual IP: one address whose new connections go to whichever replica it names.

    Connections that exist stay where they are, as in a cluster.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Switch:
        self._thread.start()
        starting = asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.upstream.rpartition(":")
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self.num_connections += 1
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (OSError, asyncio.CancelledError):
        writer.transport.abort()
    finally:
        writer.close()
