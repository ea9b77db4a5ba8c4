"""What a service is doing, and the health names that tell it to the outside.

`""`, the service's full name and `readiness` follow the state; `liveness` says SERVING until the
server stops, because a process that drains or is overloaded must not be killed for it.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import structlog
from grpc_health.v1.health_pb2 import HealthCheckResponse
from nanoinfer.v1 import generation_pb2 as pb

from nanoinfer_common import names, tasks
from nanoinfer_common.errors import StartError
from nanoinfer_common.telemetry import product_version

log = structlog.get_logger(__name__)


class ServiceStatus:
    """The state of one service, from LOADING on. Every method may be called from any thread.

    DRAINING and a failure are final: whatever is set after them is ignored.
    """

    def __init__(self) -> None:
        self.failed = asyncio.Event()
        self.failure: BaseException | None = None
        self._state = pb.SERVER_STATE_LOADING
        self._leaving = False
        self._faults: frozenset[str] = frozenset()
        self._service = ""
        self._full_name = ""
        self._health: Any = None  # the aio servicer of grpc.health.v1, which has no types
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening_since = time.monotonic_ns()

    @property
    def state(self) -> pb.ServerState:
        """What the service is doing now."""
        return self._state

    def info(self) -> pb.ServerInfo:
        """Describes the server, for `GetServerInfo`."""
        return pb.ServerInfo(
            service=self._service,
            version=product_version(),
            schema_revision=names.SCHEMA_REVISION,
            min_client_revision=names.MIN_CLIENT_REVISION,
            uptime_ns=time.monotonic_ns() - self._listening_since,
            state=self._state,
        )

    def set_serving(self) -> None:
        """Ready."""
        self._change(pb.SERVER_STATE_SERVING)

    def set_draining(self) -> None:
        """On its way out: what was admitted finishes, new requests are refused. Final."""
        self._change(pb.SERVER_STATE_DRAINING)

    def set_stalled(self) -> None:
        """No progress for too long; `set_serving` ends it."""
        self._change(pb.SERVER_STATE_STALLED)

    def set_fault(self, name: str, is_faulty: bool) -> None:
        """Health says NOT_SERVING while any background task is faulty; requests are still taken."""
        before = self._faults
        self._faults = before | {name} if is_faulty else before - {name}
        if self._faults != before:
            self._call_soon(self._start_publishing)

    def fail(self, error: BaseException) -> None:
        """Marks a fatal error: NOT_SERVING at once, then the process ends with exit code 1."""
        if self.failure is not None:
            return
        if isinstance(error, StartError):
            log.error("cannot start", error=str(error))
        else:
            log.error("fatal", exc_info=error)
        self._change(pb.SERVER_STATE_STALLED)
        self.failure = error
        self._call_soon(self.failed.set)

    async def bind(self, service: str, full_name: str, health: Any) -> None:
        """Names the service and publishes its state from now on; called by the server."""
        self._service, self._full_name, self._health = service, full_name, health
        self._loop = asyncio.get_running_loop()
        self._listening_since = time.monotonic_ns()
        await health.set(names.LIVENESS, HealthCheckResponse.SERVING)
        await self.publish()

    async def leave(self) -> None:
        """Reports NOT_SERVING from now on, while requests are still taken; a drain follows."""
        self._leaving = True
        await self.publish()

    async def publish(self) -> None:
        """Brings the health names up to the present state."""
        is_well = not self._leaving and not self._faults
        serving = self._state == pb.SERVER_STATE_SERVING and is_well
        value = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        for name in ("", self._full_name, names.READINESS):
            await self._health.set(name, value)

    def _change(self, state: pb.ServerState) -> None:
        if self._state in (state, pb.SERVER_STATE_DRAINING) or self.failure is not None:
            return
        self._state = state
        log.info("state", state=pb.ServerState.Name(state))
        self._call_soon(self._start_publishing)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def _start_publishing(self) -> None:
        tasks.start("publish health", self.publish())
