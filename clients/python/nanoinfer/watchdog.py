"""Patience of blocking calls with a gateway that cannot be reached.

gRPC keeps a call that waits for a connection until the call's own deadline, and tells a blocking
caller nothing meanwhile. A thread looks after the calls that are older than the connect timeout.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from nanoinfer import health
from nanoinfer.base import Call


class Watchdog:
    """Ends calls that have waited `seconds` for a connection of `channel`.

    Its thread runs while there are calls younger than that, or calls without an answer.
    """

    def __init__(self, channel: grpc.Channel, seconds: float) -> None:
        self._check: Callable[..., Any] = health.method(channel)
        self._seconds = seconds
        self._lock = threading.Lock()
        # By time, because each one's is `seconds` after it was added. Weak: a stream that is
        # forgotten cancels its call, and a call that is over need not be kept.
        self._due: deque[tuple[float, weakref.ref[Call[Any]]]] = deque()
        self.thread: threading.Thread | None = None

    def add(self, call: Call[Any]) -> None:
        """Looks after a call that has been started."""
        with self._lock:
            self._due.append((time.monotonic() + self._seconds, weakref.ref(call)))
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="connect", daemon=True)
                self.thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._due:
                    self.thread = None
                    return
                due, reference = self._due.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            call = reference()
            if call is None or call.answered or not call.rpc.is_active():
                continue
            if (cause := self._cause()) is None:
                self.add(call)
            else:
                call.abandon(self._seconds, cause)
            del call

    def _cause(self) -> str | None:
        """Why there is no connection; None where there is one, or where that is not known yet."""
        try:
            self._check(health.READINESS, timeout=health.PROBE_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return health.cause(error)
        except ValueError:  # the channel is closed, and with it the call
            pass
        return None
