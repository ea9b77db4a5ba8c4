"""The engine replicas: found by look-up, watched for load, picked by it.

One channel a replica. A replica serves while its `WatchLoad` stream runs and reports admission that
is not closed; a background task keeps that stream open and asks for the model at each connection.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager

import grpc
import structlog
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc, generation_pb2
from nanoinfer_common import names
from nanoinfer_common.channels import open_channel
from nanoinfer_common.errors import ServiceError, Violation, invalid, not_found_model, unavailable

MIN_RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 1.0
PROBE_SECONDS = 5.0
# the longest deadline that a server takes; the stream is then opened again
WATCH_SECONDS = 3600.0

_log = structlog.get_logger(__name__)


class Replica:
    """One engine: its channel, its model, its load and what this gateway has in flight there.

    `model` and `load` are None until they are known; `load` is None again while it is out of reach.
    """

    def __init__(self, target: str, on_change: Callable[[], None]) -> None:
        self.target = target
        self.model: generation_pb2.ModelInfo | None = None
        self.load: engine_pb2.EngineLoad | None = None
        self.num_in_flight = 0
        self.last_picked = 0
        self._on_change = on_change
        self._channel = open_channel(target)
        self.stub = engine_pb2_grpc.EngineServiceStub(self._channel)
        self._watcher = asyncio.create_task(self._watch())
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def serving(self) -> bool:
        """Whether it takes requests, a full queue included: the engine itself refuses those."""
        closed = engine_pb2.ADMISSION_STATE_CLOSED
        return self.load is not None and self.load.admission_state != closed

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Sorts replicas, best first: room in the queue, load, longest not picked.

        The load is the requests there (as reported, or as known here before the report) plus those
        that wait, which count twice, plus the share of the KV cache in use.
        """
        load = self.load or engine_pb2.EngineLoad()
        reported = load.running_requests + load.waiting_requests
        amount = max(self.num_in_flight, reported) + load.waiting_requests + load.kv_cache_usage
        full = load.admission_state == engine_pb2.ADMISSION_STATE_FULL
        return full, amount, self.last_picked

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request for as long as it is here; a removed replica waits for it."""
        self.num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._idle.set()

    async def retire(self) -> None:
        """Stop watching, wait until nothing is in flight, close the channel."""
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        await self._idle.wait()
        await self._channel.close(None)

    async def close(self) -> None:
        """Stop watching and close the channel with whatever is in flight."""
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        await self._channel.close(None)

    async def _watch(self) -> None:
        """Keep following; out of reach, try again within a second."""
        delay = MIN_RETRY_SECONDS
        while True:
            try:
                await self._follow()
                delay = MIN_RETRY_SECONDS
            except grpc.aio.AioRpcError as error:
                if self.load is not None:
                    _log.warning("engine_lost", target=self.target, code=error.code().name)
                    delay = MIN_RETRY_SECONDS
                self.load = None
                self._on_change()
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_SECONDS)

    async def _follow(self) -> None:
        """Follow the load until the stream ends; ask for the model when it begins.

        The stream's own deadline is an ordinary end. The model is asked for second, because a try
        to open the stream leaves no span, and there is one every second while an engine is away.
        """
        model = None
        reports = self.stub.WatchLoad(
            engine_pb2.EngineServiceWatchLoadRequest(), timeout=WATCH_SECONDS
        )
        try:
            async for report in reports:
                if model is None:
                    request = engine_pb2.EngineServiceGetModelInfoRequest()
                    described = await self.stub.GetModelInfo(request, timeout=PROBE_SECONDS)
                    model = self.model = _offered(described.model)
                self.load = report.load
                self._on_change()
        except grpc.aio.AioRpcError as error:
            if model is None or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        finally:
            reports.cancel()


class Replicas:
    """All replicas. `resolve` returns one target each; it is asked again every `interval` seconds.

    A failed look-up, or one that finds nothing, leaves the known replicas in place.
    """

    def __init__(
        self,
        resolve: Callable[[], Awaitable[Collection[str]]],
        interval: float,
        on_change: Callable[[], None],
    ) -> None:
        self._resolve = resolve
        self._interval = interval
        self._on_change = on_change
        self._replicas: dict[str, Replica] = {}
        self._retiring: dict[asyncio.Task[None], Replica] = {}
        self._resolver: asyncio.Task[None] | None = None
        self._num_picks = 0

    async def start(self) -> None:
        """Look the replicas up once and keep doing so in the background."""
        await self.refresh()
        self._resolver = asyncio.create_task(self._refresh_forever())

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

    def models(self) -> list[generation_pb2.ModelInfo]:
        """Return what the replicas serve: one entry a name, by name; a serving replica's first."""
        ranked = sorted(self._replicas.values(), key=lambda replica: not replica.serving)
        found: dict[str, generation_pb2.ModelInfo] = {}
        for replica in ranked:
            if replica.model is not None:
                found.setdefault(replica.model.id, replica.model)
        return [found[name] for name in sorted(found)]

    def model(self, name: str | None) -> generation_pb2.ModelInfo:
        """Return a model's description; None means the served one.

        Raises NO_ENGINE while no model is known, NOT_FOUND for another name, and INVALID_ARGUMENT
        for None where several models are served.
        """
        models = self.models()
        if not models:
            raise _no_engine()
        if name is None:
            if len(models) > 1:
                violation = Violation("options.model", "must name one of the served models")
                raise invalid(names.INVALID_REQUEST, "several models are served", violation)
            return models[0]
        for model in models:
            if model.id == name:
                return model
        raise not_found_model(name)

    def pick(self, model: str, tried: Collection[Replica] = ()) -> Replica:
        """Return the less loaded of two random serving replicas; NO_ENGINE where there is none.

        Reports are up to 100 ms old: many gateways that all took the least loaded replica would
        rush upon it together (Mitzenmacher, "The power of two choices", 2001).
        """
        candidates = self._candidates(model, tried)
        if not candidates:
            raise _no_engine()
        drawn = random.sample(candidates, min(2, len(candidates)))
        replica = min(drawn, key=lambda candidate: candidate.rank)
        self._num_picks += 1
        replica.last_picked = self._num_picks
        return replica

    def has_other(self, model: str, tried: Collection[Replica]) -> bool:
        """Whether a serving replica is left that was not tried."""
        return bool(self._candidates(model, tried))

    async def refresh(self) -> None:
        """Look the replicas up now; open channels to new ones, retire those that are gone."""
        try:
            targets = frozenset(await self._resolve())
        except OSError as error:
            _log.warning("engine_lookup_failed", error=str(error))
            return
        if not targets:
            return
        for target in targets - self._replicas.keys():
            self._replicas[target] = Replica(target, self._on_change)
        for target in self._replicas.keys() - targets:
            replica = self._replicas.pop(target)
            task = asyncio.create_task(replica.retire())
            self._retiring[task] = replica
            task.add_done_callback(self._retiring.pop)
        self._on_change()

    def _candidates(self, model: str, tried: Collection[Replica]) -> list[Replica]:
        return [
            replica
            for replica in self._replicas.values()
            if replica.serving
            and replica.model is not None
            and replica.model.id == model
            and replica not in tried
        ]

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()


def _offered(model: generation_pb2.ModelInfo) -> generation_pb2.ModelInfo:
    """The engine's description with what the gateway does itself."""
    own = (generation_pb2.FEATURE_ECHO, generation_pb2.FEATURE_TRUNCATE_PROMPT)
    model.features.extend(each for each in own if each not in model.features)
    return model


def _no_engine() -> ServiceError:
    return unavailable(names.NO_ENGINE, "no engine takes requests", retry_after=1.0)
