"""Writing stream messages: how many at one time, and for how long.

With a write in flight per stream, grpc.aio never lets anything pile up, and every token becomes a
message. With a few slots, taken in order and before a stream's buffer is emptied, what piles up
while a stream waits leaves as one message; without load nobody waits. To set and cancel timers for
each message costs more than all else here, so late ones are found with one for all (`overdue`).
"""

import asyncio
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.interruption import Interruptible
from nanoinfer_common.overdue import Overdue

NUM_SLOTS: Final = 8
# A reader that stopped reading must not keep the others waiting: its write goes on without a slot.
MAX_HOLD_SECONDS: Final = 0.1


class WriteSlots:
    """A first-come-first-served set of slots, each held for a short time at most."""

    def __init__(
        self, num_slots: int = NUM_SLOTS, max_hold_seconds: float = MAX_HOLD_SECONDS
    ) -> None:
        self._free = asyncio.Semaphore(num_slots)
        self._held: Overdue[_Hold] = Overdue(max_hold_seconds, lambda _: self._free.release())

    def hold(self) -> "_Hold":
        """Hold a slot while an `async with` block runs, but not longer than the bound."""
        return _Hold(self._free, self._held)


class _Hold:
    def __init__(self, free: asyncio.Semaphore, held: "Overdue[_Hold]") -> None:
        self._free, self._held = free, held

    async def __aenter__(self) -> None:
        await self._free.acquire()
        self._held.add(self)

    async def __aexit__(self, *_: object) -> None:
        if self._held.discard(self):
            self._free.release()


class StreamWriter:
    """Writes messages, and ends a stream whose reader takes none for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: Overdue[Interruptible] = Overdue(seconds, Interruptible.interrupt)

    async def write(self, context: Any, message: Message) -> None:
        """Write one; raises ServiceError STREAM_STALLED where it takes too long."""
        with Interruptible(self._stalled) as writing:
            self._running.add(writing)
            try:
                await context.write(message)
            finally:
                self._running.discard(writing)

    def _stalled(self) -> ServiceError:
        return ServiceError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            names.STREAM_STALLED,
            f"the client took no message for {self._seconds:g} s",
        )
