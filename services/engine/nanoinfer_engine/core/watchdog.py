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

from nanoinfer_engine.core.settings import setting

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """Settings of how long the engine waits for steps and readers; each field is a flag."""

    step_seconds: float = setting(
        60.0,
        "Time without a finished step after which the engine reports NOT_SERVING.",
        flag="stall_seconds",
        gt=0,
    )
    reader_seconds: float = setting(
        30.0,
        "Time after which a client that does not read loses its stream.",
        flag="reader_stall_seconds",
        gt=0,
    )
    buffered_tokens: int = setting(
        4096,
        "Unread tokens of a stream from which that time counts.",
        flag="max_buffered_tokens",
        ge=1,
    )
    buffered_bytes: int = setting(
        256 * 1024**2,
        "Most memory of unread tokens and log-probabilities of all streams; beyond it the"
        " stream with the most loses its client. Raise it where many score long prompts.",
        flag="max_buffered_bytes",
        in_bytes=True,
        gt=0,
    )


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
