"""Answer messages on their way out: their headers, their bytes, and those that nobody takes."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError, exhausted

RETRY_AFTER_SECONDS: Final = 1.0


class Outbox:
    """The bytes that a server's clients were sent and have not taken, of all calls together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def refusal(self) -> ServiceError | None:
        """Return why a new call cannot be taken; None if it can."""
        if self.num_bytes <= self._max_bytes:
            return None
        message = "too many bytes of answers wait for clients that do not read"
        return exhausted(names.QUEUE_FULL, message, RETRY_AFTER_SECONDS)


class CallContext:
    """gRPC's context of a call, which writes the answer's messages as this server needs it.

    Headers go out on their own before the first message. A message that the reader does not take
    keeps whatever was to be sent with it: were the headers part of that, no status could follow.
    They never go out earlier, because a client repeats a call elsewhere only while it has none.

    The bytes of a write that was given up stay with gRPC until the client takes them or leaves,
    which the end of the call tells; so long they count.
    """

    def __init__(
        self, context: Any, serialize: Callable[[Any], bytes] | None, outbox: Outbox
    ) -> None:
        self._context = context
        self._serialize = serialize
        self._outbox = outbox
        self._num_bytes = 0
        self._opening: asyncio.Future[None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Write one message; done when the transport took it."""
        raw = message if self._serialize is None else self._serialize(message)
        self._count(len(raw))
        await self._open()
        await self._context.write(raw)
        self._count(-len(raw))

    async def opened(self) -> None:
        """Wait until headers that are on their way are out."""
        if self._opening is not None:
            await asyncio.wait([self._opening])

    def close(self) -> None:
        """Count no bytes any more: the call is over."""
        self._count(-self._num_bytes)

    async def _open(self) -> None:
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._context.send_initial_metadata(()))
            # Where the client is gone nobody may be left to be told.
            self._opening.add_done_callback(lambda done: done.cancelled() or done.exception())
        if not self._opening.done():
            # Goes on where this task is cancelled: headers are sent once, and a status after them.
            await asyncio.shield(self._opening)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._outbox.num_bytes += num_bytes
