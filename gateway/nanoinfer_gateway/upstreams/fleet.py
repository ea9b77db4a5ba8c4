"""Replicas of a service: found by look-up, followed one by one, replaced where they fall silent.

Each replica has a connection of its own, and its reports over it are its heartbeat: a process that
is frozen, or cut off, keeps its connections open and says nothing. A silent connection gets no more
calls and a new one takes its place. Calls on the old one may go on there or, as long as they have
brought nothing, move to another replica.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
import structlog
from nanoinfer_common import tasks
from nanoinfer_common.channels import open_channel

from nanoinfer_gateway.upstreams.interruption import Interruption, Silence

MIN_RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 1.0
# A replica that has never said anything may still be on its way up.
FIRST_WORD_SECONDS = 20.0
# Two channels to one address would share a connection otherwise, the silent one.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)

log = structlog.get_logger(__name__)


class SilentError(Exception):
    """Nothing is heard from a replica any more."""


class Connection:
    """A channel to a replica, from its opening until it is silent or the replica is gone."""

    def __init__(self, target: str) -> None:
        self.channel = open_channel(target, OWN_CONNECTION)
        self.is_silent = False
        self.num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request for as long as it is here; `retire` waits for it."""
        self.num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._idle.set()

    async def retire(self) -> None:
        """Wait until nothing is in flight and close the channel, also where that is cut short."""
        try:
            await self._idle.wait()
        finally:
            await self.channel.close(None)


@dataclass(frozen=True)
class Watching:
    """The bound of silence in seconds, and the function that is told of changes."""

    silence_seconds: float
    on_change: Callable[[], None]


class Replica(ABC):
    """One replica: its target, its present connection and whether it takes requests."""

    def __init__(self, target: str, watching: Watching) -> None:
        self.target = target
        self.last_picked = 0
        self.connection = self._connect()
        self._watching = watching
        self._retiring: set[asyncio.Task[None]] = set()
        self._watcher = tasks.keep_running(f"watch {target}", self._watch, self._fault)

    @property
    @abstractmethod
    def serving(self) -> bool:
        """Whether it takes requests."""

    @abstractmethod
    def _connected(self, connection: Connection) -> None:
        """Make what calls need of a new connection."""

    @abstractmethod
    def _lost(self) -> None:
        """Forget what was reported; `serving` is False from now on."""

    @abstractmethod
    async def _follow(self, connection: Connection, silence: Silence) -> None:
        """Follow the replica until its connection ends; AioRpcError where it is out of reach.

        Calls `silence.heard` at each sign of life, and `_changed` at each change.
        """

    def in_flight(self) -> AbstractContextManager[None]:
        """Count a request on the present connection."""
        return self.connection.in_flight()

    async def retire(self) -> None:
        """Stop watching, wait until nothing is in flight, close the channels."""
        await self._stop_watching()
        await asyncio.gather(self.connection.retire(), *self._retiring)

    async def close(self) -> None:
        """Stop watching and close the channels with whatever is in flight."""
        await self._stop_watching()
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self.connection.channel.close(None)

    def _changed(self) -> None:
        self._watching.on_change()

    async def _stop_watching(self) -> None:
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)

    def _connect(self) -> Connection:
        connection = Connection(self.target)
        self._connected(connection)
        return connection

    async def _watch(self) -> None:
        """Keep following; out of reach, try again within a second."""
        delay = MIN_RETRY_SECONDS
        while True:
            first = max(self._watching.silence_seconds, FIRST_WORD_SECONDS)
            try:
                with Silence(first, SilentError()) as silence:
                    await self._follow(self.connection, silence)
                delay = MIN_RETRY_SECONDS
            except grpc.aio.AioRpcError as error:
                if self.serving:
                    log.warning("replica_lost", target=self.target, code=error.code().name)
                    delay = MIN_RETRY_SECONDS
                self._out()
            except SilentError:
                if self.serving:
                    log.warning("replica_silent", target=self.target)
                self._replace_connection()
                self._out()
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_SECONDS)

    def _replace_connection(self) -> None:
        silent, self.connection = self.connection, self._connect()
        silent.is_silent = True
        task = tasks.start(f"retire a connection to {self.target}", silent.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _out(self) -> None:
        self._lost()
        self._changed()

    def _fault(self, _: str, is_faulty: bool) -> None:
        """A watcher that failed knows nothing of its replica; one that runs reports by itself."""
        if is_faulty:
            self._out()


AnyReplica = TypeVar("AnyReplica", bound=Replica)


class Fleet(Generic[AnyReplica]):
    """All replicas. `resolve` returns one target each; it is asked again every `interval` seconds.

    A failed look-up, or one that finds nothing, leaves the known replicas in place. `report` is
    told of a look-up that fails unexpectedly, and of one that works again.
    """

    def __init__(
        self,
        resolve: Callable[[], Awaitable[Collection[str]]],
        interval: float,
        open_replica: Callable[[str, Callable[[], None]], AnyReplica],
        on_change: Callable[[], None],
        report: tasks.Report,
    ) -> None:
        self._resolve = resolve
        self._interval = interval
        self._open_replica = open_replica
        self._on_change = on_change
        self._report = report
        self._replicas: dict[str, AnyReplica] = {}
        self._retiring: dict[asyncio.Task[None], AnyReplica] = {}
        self._resolver: asyncio.Task[None] | None = None
        self._movable: dict[Interruption, tuple[Connection, Callable[[], bool]]] = {}
        self._num_picks = 0

    async def start(self) -> None:
        """Look the replicas up once and keep doing so in the background."""
        await self.refresh()
        self._resolver = tasks.keep_running("look-up", self._refresh_forever, self._report)

    async def stop(self) -> None:
        """End the background tasks and close every channel."""
        if self._resolver is not None:
            self._resolver.cancel()
            await asyncio.gather(self._resolver, return_exceptions=True)
        replicas = [*self._replicas.values(), *self._retiring.values()]
        retiring = list(self._retiring)
        for task in retiring:
            task.cancel()
        await asyncio.gather(*retiring, return_exceptions=True)
        await asyncio.gather(*[replica.close() for replica in replicas])

    @property
    def any_serving(self) -> bool:
        """Whether at least one replica takes requests."""
        return any(replica.serving for replica in self._replicas.values())

    async def refresh(self) -> None:
        """Look the replicas up now; open channels to new ones, retire those that are gone."""
        try:
            targets = frozenset(await self._resolve())
        except OSError as error:
            log.warning("lookup_failed", error=str(error))
            return
        if not targets:
            return
        for target in targets - self._replicas.keys():
            self._replicas[target] = self._open_replica(target, self._changed)
        for target in self._replicas.keys() - targets:
            replica = self._replicas.pop(target)
            task = tasks.start(f"retire {target}", replica.retire())
            self._retiring[task] = replica
            task.add_done_callback(self._retiring.pop)
        self._changed()

    @contextmanager
    def movable(self, connection: Connection, has_other: Callable[[], bool]) -> Iterator[None]:
        """End the block with SilentError once the connection is silent and another would do.

        While there is no other, the replica may still come back and go on. For blocks that do not
        yield.
        """
        with Interruption(SilentError()) as interruption:
            self._movable[interruption] = connection, has_other
            try:
                yield
            finally:
                del self._movable[interruption]

    def _picked(self, replica: AnyReplica) -> AnyReplica:
        self._num_picks += 1
        replica.last_picked = self._num_picks
        return replica

    def _candidates(self, tried: Collection[Connection]) -> list[AnyReplica]:
        return [
            replica
            for replica in self._replicas.values()
            if replica.serving and replica.connection not in tried
        ]

    def _changed(self) -> None:
        self._on_change()
        for interruption, (connection, has_other) in self._movable.items():
            if connection.is_silent and has_other():
                interruption.interrupt()

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()
