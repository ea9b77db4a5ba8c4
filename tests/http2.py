"""A gRPC client on bare HTTP/2, which does what gRPC's own never would: take nothing, or vanish."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings


@dataclass
class Stream:
    """What has come back on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    is_reset: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Http2Client:
    """One connection; its streams start with a window of `window` bytes for the server's data."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int
    ) -> None:
        config = h2.config.H2Configuration(header_encoding="utf-8")
        self._reader, self._writer = reader, writer
        self._h2 = h2.connection.H2Connection(config)
        self._h2.local_settings = h2.settings.Settings(
            initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self._h2.initiate_connection()
        self._flush()
        self._streams: dict[int, Stream] = {}
        self._has_room = asyncio.Event()
        self._receiving = asyncio.create_task(self._receive())

    async def call(self, method: str, message: bytes, *metadata: tuple[str, str]) -> int:
        """Send a whole unary request; return the stream's id."""
        stream_id = self.open(method, *metadata)
        await self.send(stream_id, struct.pack(">BI", 0, len(message)) + message)
        self._h2.end_stream(stream_id)
        self._flush()
        return stream_id

    def open(self, method: str, *metadata: tuple[str, str]) -> int:
        """Send a request's headers alone."""
        stream_id = self._h2.get_next_available_stream_id()
        self._streams[stream_id] = Stream()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", f"/{method}")]
        headers += [(":authority", "test"), ("content-type", "application/grpc")]
        self._h2.send_headers(stream_id, [*headers, ("te", "trailers"), *metadata])
        self._flush()
        return stream_id

    async def send(self, stream_id: int, data: bytes) -> None:
        """Send bytes of a request as the server's windows allow."""
        while data:
            size = min(
                self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size
            )
            if size:
                self._h2.send_data(stream_id, data[:size])
                self._flush()
                data = data[size:]
            else:
                self._has_room.clear()
                await self._has_room.wait()

    def widen(self, stream_id: int, size: int) -> None:
        """Let the server send `size` more bytes on a stream."""
        self._h2.increment_flow_control_window(size, stream_id)
        self._flush()

    def stream(self, stream_id: int) -> Stream:
        """Return what has come back."""
        return self._streams[stream_id]

    @property
    def streams(self) -> list[Stream]:
        """Every stream there was."""
        return list(self._streams.values())

    async def vanish(self) -> None:
        """Reset the TCP connection, without a word of HTTP/2."""
        if self._writer.transport.is_closing():
            return
        self._receiving.cancel()
        raw: socket.socket = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        await asyncio.gather(self._receiving, return_exceptions=True)

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())

    async def _receive(self) -> None:
        while received := await self._reader.read(65536):
            for event in self._h2.receive_data(received):
                self._handle(event)
            self._flush()

    def _handle(self, event: Any) -> None:
        self._has_room.set()
        stream = self._streams.get(getattr(event, "stream_id", 0) or 0, Stream())
        if isinstance(event, h2.events.ResponseReceived):
            stream.headers.update(event.headers)
            if "grpc-status" in stream.headers:  # no message came before the status
                stream.trailers = stream.headers
        elif isinstance(event, h2.events.TrailersReceived):
            stream.trailers.update(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            stream.data += event.data
            self._h2.increment_flow_control_window(len(event.data))
        elif isinstance(event, h2.events.StreamEnded):
            stream.ended.set()
        elif isinstance(event, h2.events.StreamReset):
            stream.is_reset = True
            stream.ended.set()


@asynccontextmanager
async def connect(address: str, window: int = 65535) -> AsyncIterator[Http2Client]:
    """Connect to `address`; the connection's own window is ever refilled."""
    host, _, port = address.rpartition(":")
    client = Http2Client(*await asyncio.open_connection(host, int(port)), window)
    try:
        yield client
    finally:
        await client.vanish()
