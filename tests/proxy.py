"""A TCP proxy that stands for a bad network: latency, lost packets, a peer that is gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_PIECE = 1400  # bytes of a packet


@dataclass
class Proxy:
    """Forwards what comes after `delay` seconds, each way; one piece in `stalls_every` later.

    A lost packet stops what follows it until it has been sent again, `stall` seconds later.
    """

    delay: float = 0.0
    stalls_every: int = 0
    stall: float = 0.4
    address: str = ""
    num_connections: int = 0
    num_stalls: int = 0
    _num_pieces: int = 0
    _holes: list[asyncio.Event] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def fall_silent(self) -> None:
        """Forwards nothing more on the connections there are, and tells neither end.

        As when a machine or a route is gone: the connection is half open. New ones work.
        """
        for hole in self._holes:
            hole.set()
        self._holes.clear()

    @asynccontextmanager
    async def to(self, target: str) -> AsyncIterator["Proxy"]:
        """Listens on a free port and forwards to `target` while the block runs."""
        host, _, port = target.rpartition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.num_connections += 1
            their_reader, their_writer = await asyncio.open_connection(host, int(port))
            hole = asyncio.Event()
            self._holes.append(hole)
            self._writers += [writer, their_writer]
            for source, sink in ((reader, their_writer), (their_reader, writer)):
                task = asyncio.create_task(self._forward(source, sink, hole))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in self._writers:
                writer.transport.abort()
            closed = [writer.wait_closed() for writer in self._writers]
            await asyncio.gather(*closed, return_exceptions=True)

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, hole: asyncio.Event
    ) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        writing = asyncio.create_task(self._write(pieces, sink, hole))
        now = asyncio.get_running_loop().time
        try:
            while data := await source.read(_PIECE):
                if hole.is_set():
                    await asyncio.Event().wait()
                pieces.put_nowait((now() + self.delay, data))
            pieces.put_nowait((now() + self.delay, b""))
            await writing
        except ConnectionError:
            pass  # either end has gone; the other one is told below
        finally:
            writing.cancel()
            if not hole.is_set():
                sink.close()

    async def _write(
        self,
        pieces: asyncio.Queue[tuple[float, bytes]],
        sink: asyncio.StreamWriter,
        hole: asyncio.Event,
    ) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due, data = await pieces.get()
            self._num_pieces += 1
            if self.stalls_every and self._num_pieces % self.stalls_every == 0:
                self.num_stalls += 1
                due += self.stall
            await asyncio.sleep(due - now())
            if hole.is_set():
                await asyncio.Event().wait()
            if not data:
                return
            sink.write(data)
            await sink.drain()
