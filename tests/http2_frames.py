"""HTTP/2 by hand, for what `tests.http2` cannot do: `h2` reads nothing after a GOAWAY."""

from __future__ import annotations

import asyncio
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4
CANCEL = 8


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
    return head + payload


def header(name: str, value: str) -> bytes:
    """A header field of HPACK, literal and not indexed; shorter than 127 bytes each."""
    parts = (each.encode() for each in (name, value))
    return b"\x00" + b"".join(bytes([len(part)]) + part for part in parts)


class Connection:
    """A connection that sends what it is told and reads what comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_answered = 0
        self.num_data = 0
        self.goaway = b""
        self.frames: list[tuple[int, int]] = []  # kind and stream of what came
        self._next_stream = 1
        self._reader, self._writer = reader, writer
        self._reading = asyncio.create_task(self._read())
        writer.write(PREFACE + frame(SETTINGS))

    @classmethod
    async def open(cls, address: str) -> Connection:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ping(self, seconds: float = 60) -> bool:
        """Whether a ping came back before the server said goodbye."""
        before = self.num_answered
        self._writer.write(frame(PING, payload=bytes(8)))
        async with asyncio.timeout(seconds):
            while self.num_answered == before and not (self.goaway or self._reading.done()):
                await asyncio.sleep(0.005)
        return not self.goaway

    def call(self, path: str, message: bytes) -> int:
        """Makes a gRPC call and returns its stream's number."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
        fields |= {"content-type": "application/grpc", "te": "trailers"}
        block = b"".join(header(name, value) for name, value in fields.items())
        body = b"\x00" + struct.pack(">I", len(message)) + message
        self._writer.write(
            frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, body)
        )
        return stream

    def reset(self, stream: int) -> None:
        """Gives a call up."""
        self._writer.write(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))

    async def close(self) -> None:
        self._writer.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            try:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            kind, flags = head[3], head[4]
            self.frames.append((kind, int.from_bytes(head[5:], "big")))
            if kind == SETTINGS and not flags & ACK:
                self._writer.write(frame(SETTINGS, ACK))
            if kind == PING and not flags & ACK:
                self._writer.write(frame(PING, ACK, payload=payload))
            self.num_data += kind == DATA
            self.num_answered += kind == PING and bool(flags & ACK)
            if kind == GOAWAY:
                self.goaway = payload
