"""How many writes may be in flight at once: what makes outputs merge under load.

Without a bound grpc.aio sends one token a message at any load, because the backlog stays before
the buffers. With a few slots, taken in order and before a buffer is emptied, it builds up inside
them, where it merges.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

NUM_SLOTS = 8
# A reader that has stopped reading must not keep the others waiting: its write goes on, but
# without a slot.
MAX_HOLD_SECONDS = 0.1


class WriteSlots:
    """A first-come-first-served set of slots, each held for a short time at most."""

    def __init__(
        self, num_slots: int = NUM_SLOTS, max_hold_seconds: float = MAX_HOLD_SECONDS
    ) -> None:
        """Start with all slots free."""
        self._free = asyncio.Semaphore(num_slots)
        self._max_hold_seconds = max_hold_seconds

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot while the block runs, but not longer than the bound."""
        await self._free.acquire()
        timer = asyncio.get_running_loop().call_later(self._max_hold_seconds, self._free.release)
        try:
            yield
        finally:
            if asyncio.get_running_loop().time() < timer.when():
                timer.cancel()
                self._free.release()
