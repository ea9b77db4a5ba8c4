"""Request messages on their way in: how many bytes are taken, and what becomes of them.

gRPC would read and parse a message before any handler runs. Here a call reads its own, so that
bytes are bounded before they are parsed, and an error of parsing has a status like any other.

A message being read may become as large as the largest that is allowed, so few are read at one
time; the rest waits in HTTP/2's flow control, where a stream holds 64 KiB at most. A message that
has been read counts with its bytes until its call ends. Slow senders keep others waiting for a few
seconds at most: with all places taken, the message that has been arriving for longest is given up.
The more wait, the sooner: a sender of headers alone would hold each of its streams' places for all
the time that is allowed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import grpc
from google.protobuf.message import DecodeError

from nanoinfer_common import errors, names
from nanoinfer_common.errors import ServiceError, invalid
from nanoinfer_common.interruption import Interruptible

RETRY_AFTER_SECONDS: Final = 1.0
# A sender that needs longer than this for a message loses its place to others, if they need it.
MAX_HOLD_SECONDS: Final = 1.0
# The same where the most wait: a message that has arrived whole is read within a few milliseconds.
MIN_HOLD_SECONDS: Final = 0.05
# After a pause of this process, what came meanwhile is read first.
GRACE_SECONDS: Final = 0.01
CANCEL_SECONDS: Final = 1.0


class Inbox:
    """The bytes of all requests of a server: those being read, and those held by their calls."""

    def __init__(
        self, max_bytes: int, max_message_bytes: int, max_hold_seconds: float = MAX_HOLD_SECONDS
    ) -> None:
        """Half of `max_bytes` is for messages being read, the other half for those read."""
        self._max_held_bytes = max(max_bytes // 2, max_message_bytes)
        self.num_held_bytes = 0
        self._num_places = max(1, max_bytes // 2 // max_message_bytes)
        self._places = asyncio.Semaphore(self._num_places)
        self._max_hold_seconds = max_hold_seconds
        self._num_waiting = 0
        self._reading: dict[Interruptible, float] = {}  # since when, the oldest first
        self._given_up: set[Interruptible] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, context: Any) -> bytes:
        """Read the one message of a unary request.

        Raises ServiceError: RESOURCE_EXHAUSTED for a sender that others cannot wait for, and
        INVALID_ARGUMENT where the stream ends without a message.
        """
        loop = asyncio.get_running_loop()
        self._num_waiting += 1
        try:
            if self._timer is None and self._places.locked():
                self._look_later()
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        try:
            with Interruptible(_too_slow) as reading:
                self._reading[reading] = loop.time()
                try:
                    raw = await context.read()
                finally:
                    self._reading.pop(reading, None)
                    self._given_up.discard(reading)
        finally:
            self._places.release()
        if raw is cast(Any, grpc.aio).EOF:  # the stubs lack it
            # A client that is gone looks alike until its cancel arrives, which ends this task.
            await asyncio.sleep(CANCEL_SECONDS)
            raise invalid(names.INVALID_REQUEST, "the request has no message")
        return bytes(raw)

    @contextmanager
    def held(self, num_bytes: int) -> Iterator[None]:
        """Count a message's bytes while the block runs.

        Raises RESOURCE_EXHAUSTED with RetryInfo where they do not fit. A message larger than all
        there may be is let in when nothing else is held.
        """
        if self.num_held_bytes and self.num_held_bytes + num_bytes > self._max_held_bytes:
            message = "too many bytes of requests are under way"
            raise errors.exhausted(names.QUEUE_FULL, message, RETRY_AFTER_SECONDS)
        self.num_held_bytes += num_bytes
        try:
            yield
        finally:
            self.num_held_bytes -= num_bytes

    def _hold_seconds(self) -> float:
        """Return how long a sender keeps its place: shorter the more wait for one."""
        share = self._num_places / max(self._num_waiting, self._num_places)
        return min(self._max_hold_seconds, max(MIN_HOLD_SECONDS, self._max_hold_seconds * share))

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(MIN_HOLD_SECONDS, self._pause)

    def _pause(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._look)

    def _look(self) -> None:
        """Give up what is late while more wait than places are about to be free; look again."""
        self._timer = None
        late = asyncio.get_running_loop().time() - self._hold_seconds()
        while self._reading and self._num_waiting > len(self._given_up):
            reading, since = next(iter(self._reading.items()))
            if since > late:
                break
            del self._reading[reading]
            self._given_up.add(reading)
            reading.interrupt()
        if self._num_waiting:
            self._look_later()


async def parsed(
    messages: AsyncIterator[bytes], deserialize: Callable[[bytes], Any] | None
) -> AsyncIterator[Any]:
    """Parse the messages of a streamed request one by one; raises what `parse` raises."""
    async for raw in messages:
        yield parse(raw, deserialize)


def parse(raw: bytes, deserialize: Callable[[bytes], Any] | None) -> Any:
    """Parse a message; INVALID_ARGUMENT for bytes that are none. Without a parser it stays bytes.

    The error says nothing of the bytes, nor of the parser, whose texts name classes.
    """
    if deserialize is None:
        return raw
    try:
        return deserialize(raw)
    except (DecodeError, RecursionError, ValueError) as error:
        message = "the request is no message of this method: its bytes cannot be parsed"
        raise invalid(names.INVALID_REQUEST, message) from error


def _too_slow() -> ServiceError:
    message = "the request arrived too slowly while others waited"
    return errors.exhausted(names.QUEUE_FULL, message, RETRY_AFTER_SECONDS)
