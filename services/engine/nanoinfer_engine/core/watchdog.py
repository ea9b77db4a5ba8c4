"""Notices that the engine makes no progress although there is work. Lives on the event loop.

Health follows steps, not an open port: a process whose step hangs still answers on its socket.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long the engine waits before it calls something stalled.

    `step_seconds` without a finished step while there is work makes the engine stalled. A stream
    with more than `buffered_tokens` unread tokens for `reader_seconds` is ended. Where all streams
    together hold more than `buffered_bytes` unread, the one that holds most is ended at once.
    """

    step_seconds: float = 60.0
    reader_seconds: float = 30.0
    buffered_tokens: int = 4096
    buffered_bytes: int = 256 * 1024**2


class Listener(Protocol):
    """Whom the engine tells how it is, on the event loop."""

    def stalled(self, is_stalled: bool) -> None:
        """No step ends although there is work (True), or one did again (False)."""

    def lost(self, error: BaseException) -> None:
        """The engine can serve no more."""


async def watch_progress(
    limit_seconds: float,
    progress: Callable[[], int | None],
    report: Callable[[bool], None],
    is_stalled: bool = False,
) -> None:
    """Report True when the last progress is older than the limit, False when it goes on again.

    `progress` gives monotonic nanoseconds, or None where there is no work to progress with.
    Runs until cancelled; `is_stalled` is what was reported last.
    """
    while True:
        await asyncio.sleep(min(1.0, limit_seconds / 4))
        last = progress()
        age = 0.0 if last is None else (time.monotonic_ns() - last) * 1e-9
        if (age > limit_seconds) == is_stalled:
            continue
        is_stalled = not is_stalled
        if is_stalled:
            _LOG.error("no step has ended for %.1f s", age)
        else:
            _LOG.warning("steps end again")
        report(is_stalled)
