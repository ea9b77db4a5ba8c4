"""How many stream messages are written at one time, over all streams.

With a write in flight per stream, grpc.aio never lets anything pile up, and every token becomes a
message. With a few slots, taken in order and before a stream's buffer is emptied, what piles up
while a stream waits leaves as one message; without load nobody waits.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# a reader that stopped reading must not keep the others waiting: its write goes on without a slot
MAX_HOLD_SECONDS = 0.1


class WriteSlots:
    """A fixed number of slots, first come, first served."""

    def __init__(self, num_slots: int) -> None:
        self._free = asyncio.Semaphore(num_slots)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Hold a slot while the block runs, or for 100 ms where it runs longer."""
        await self._free.acquire()
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(MAX_HOLD_SECONDS, release)
        try:
            yield
        finally:
            timer.cancel()
            release()
