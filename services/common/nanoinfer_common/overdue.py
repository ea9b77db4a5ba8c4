"""Tells of entries that stay too long, with one timer for all of them instead of one each."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Entry = TypeVar("Entry", bound=Hashable)


class Overdue(Generic[Entry]):
    """Entries of an event loop, each of which may stay for `seconds`.

    All may stay equally long, so the oldest is always the next: adding and discarding cost a
    dictionary's entry, and where entries leave soon the timer goes off about once in `seconds`.
    """

    def __init__(self, seconds: float, call: Callable[[Entry], None]) -> None:
        """`call` is called with an entry that is late; it is gone by then."""
        self._seconds = seconds
        self._call = call
        self._since: dict[Entry, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # to ask is a system call, up to 3.11
        self._timer: asyncio.TimerHandle | None = None

    def add(self, entry: Entry) -> None:
        """From now on its time runs; `entry` is not there yet."""
        loop = self._loop = self._loop or asyncio.get_running_loop()
        self._since[entry] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._look)

    def discard(self, entry: Entry) -> bool:
        """Forget it; whether it was still there."""
        return self._since.pop(entry, None) is not None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer, now = None, loop.time()
        while self._since:
            entry, since = next(iter(self._since.items()))
            if (left := since + self._seconds - now) > 0:
                self._timer = loop.call_later(left, self._look)
                return
            del self._since[entry]
            self._call(entry)
