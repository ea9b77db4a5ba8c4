"""Patience of blocking calls with a gateway that cannot be reached.

gRPC keeps a call that waits for a connection until the call's own deadline, and tells a blocking
caller nothing meanwhile. A thread looks after the calls that have no answer yet.

A probe that succeeds proves that the calls made before it have reached a gateway. One that drains
closes its port and still answers them, so a proven call gets the time of a drain, and only one
that never had a connection is given up after the connect timeout.
"""

import heapq
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from nanoinfer import health
from nanoinfer.base import Call

PROBE_SECONDS = 0.25
"""Age at which a call without an answer is looked at for the first time."""

DRAIN_SECONDS = 35.0
"""Time left to a call whose gateway has gone: a drain's 30 s, and what ending takes."""


@dataclass(order=True)
class _Watched:
    """A call by the time at which it is looked at next; weak, because a forgotten stream ends.

    `lost` is when a probe first failed after one had proven the call.
    """

    due: float
    started: float = field(compare=False)
    call: weakref.ref[Call[Any]] = field(compare=False)
    is_proven: bool = field(default=False, compare=False)
    lost: float | None = field(default=None, compare=False)


class Watchdog:
    """Ends calls that have waited `seconds` for a connection of `channel`.

    Its thread runs while there are calls that were just made, or calls without an answer.
    """

    def __init__(self, channel: grpc.Channel, seconds: float) -> None:
        self._check: Callable[..., Any] = health.method(channel)
        self._seconds = seconds
        self._changed = threading.Condition()
        self._watched: list[_Watched] = []
        self._last_success = 0.0  # when the last probe that succeeded began
        self.thread: threading.Thread | None = None

    def add(self, call: Call[Any]) -> None:
        """Looks after a call that has been started."""
        now = time.monotonic()
        first = now + min(PROBE_SECONDS, self._seconds)
        self._push(_Watched(first, now, weakref.ref(call)))

    def _push(self, watched: _Watched) -> None:
        with self._changed:
            heapq.heappush(self._watched, watched)
            self._changed.notify()
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="connect", daemon=True)
                self.thread.start()

    def _next(self) -> _Watched | None:
        """The call whose turn has come; None, and no thread any more, where there is none."""
        with self._changed:
            while self._watched:
                left = self._watched[0].due - time.monotonic()
                if left <= 0:
                    return heapq.heappop(self._watched)
                self._changed.wait(left)
            self.thread = None
            return None

    def _run(self) -> None:
        while (watched := self._next()) is not None:
            call = watched.call()
            if call is not None and not call.answered and call.rpc.is_active():
                self._look(watched, call)
            del call

    def _look(self, watched: _Watched, call: Call[Any]) -> None:
        """Gives a call up, or decides when it is looked at again."""
        now = time.monotonic()
        is_proven = watched.is_proven or watched.started <= self._last_success
        cause = None if is_proven and not watched.is_proven else self._cause()
        watched.is_proven = is_proven or watched.started <= self._last_success
        if cause is None:
            watched.lost, watched.due = None, now + self._seconds
        elif watched.is_proven:
            watched.lost = now if watched.lost is None else watched.lost
            if now - watched.lost >= DRAIN_SECONDS:
                call.abandon(DRAIN_SECONDS, cause)
                return
            watched.due = now + min(self._seconds, DRAIN_SECONDS)
        else:
            watched.due = watched.started + self._seconds
            if now >= watched.due:
                call.abandon(self._seconds, cause)
                return
        self._push(watched)

    def _cause(self) -> str | None:
        """Why there is no connection; None where there is one, or where that is not known yet."""
        began = time.monotonic()
        try:
            self._check(health.READINESS, timeout=health.PROBE_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return health.cause(error)
            if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                return None
        except ValueError:  # the channel is closed, and with it the call
            return None
        self._last_success = began
        return None
