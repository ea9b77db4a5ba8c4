"""How many stream messages are written at one time, over all streams of a server.

With a write in flight per stream, grpc.aio never lets anything pile up, and every token becomes a
message. With a few slots, taken in order and before a stream's buffer is emptied, what piles up
while a stream waits leaves as one message; without load nobody waits.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

NUM_SLOTS: Final = 8
# A reader that stopped reading must not keep the others waiting: its write goes on without a slot.
MAX_HOLD_SECONDS: Final = 0.1


class WriteSlots:
    """A first-come-first-served set of slots, each held for a short time at most."""

    def __init__(
        self, num_slots: int = NUM_SLOTS, max_hold_seconds: float = MAX_HOLD_SECONDS
    ) -> None:
        self._free = asyncio.Semaphore(num_slots)
        self._max_hold_seconds = max_hold_seconds

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Hold a slot while the block runs, but not longer than the bound."""
        await self._free.acquire()
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._max_hold_seconds, release)
        try:
            yield
        finally:
            timer.cancel()
            release()
