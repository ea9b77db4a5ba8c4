"""Pings of clients on raw HTTP/2 connections: 10 s apart is fine, a flood is not."""

import asyncio
import struct

import pytest
from nanoinfer_common import server

from tests.common.conftest import start_probe

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags, 0, 0, 0, 0]) + payload


class Connection:
    """An HTTP/2 connection that sends settings and pings, and no request ever."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_answered = 0
        self.goaway = b""
        self._reader, self._writer = reader, writer
        self._reading = asyncio.create_task(self._read())
        writer.write(PREFACE + frame(SETTINGS))

    @classmethod
    async def open(cls, address: str) -> "Connection":
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ping(self, seconds: float = 20) -> bool:
        """Whether a ping came back before the server said goodbye."""
        before = self.num_answered
        self._writer.write(frame(PING, payload=bytes(8)))
        async with asyncio.timeout(seconds):
            while self.num_answered == before and not self._reading.done():
                await asyncio.sleep(0.005)
        return not self.goaway

    async def close(self) -> None:
        self._writer.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            try:
                header = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(header[:3], "big"))
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            kind, flags = header[3], header[4]
            if kind == SETTINGS and not flags & ACK:
                self._writer.write(frame(SETTINGS, ACK))
            self.num_answered += kind == PING and bool(flags & ACK)
            if kind == GOAWAY:
                self.goaway = payload
                return


async def test_pings_without_calls_that_keep_the_interval_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MIN_PING_INTERVAL_MILLISECONDS", 50)
    async with start_probe() as probe:
        connection = await Connection.open(probe.server.address)
        for _ in range(8):
            assert await connection.ping(), connection.goaway
            await asyncio.sleep(0.1)
        await connection.close()


async def test_a_flood_of_pings_ends_its_connection_alone() -> None:
    async with start_probe() as probe:
        flood, calm = [await Connection.open(probe.server.address) for _ in range(2)]
        answers = [await flood.ping() for _ in range(6)]
        assert answers[0]
        assert not answers[-1]
        assert b"too_many_pings" in flood.goaway
        assert await calm.ping()
        for connection in (flood, calm):
            await connection.close()


def test_the_interval_leaves_room_for_clients_that_ping_every_ten_seconds() -> None:
    assert 1000 <= server.MIN_PING_INTERVAL_MILLISECONDS <= 5000


@pytest.mark.slow
async def test_a_client_that_pings_every_ten_seconds_stays() -> None:
    async with start_probe() as probe:
        connection = await Connection.open(probe.server.address)
        for _ in range(5):
            assert await connection.ping(), connection.goaway
            await asyncio.sleep(10)
        assert await connection.ping(), connection.goaway
        await connection.close()
