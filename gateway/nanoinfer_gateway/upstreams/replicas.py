"""The engine replicas: watched for load, picked by it.

A replica serves while its `WatchLoad` stream runs, is not silent and reports admission that is not
closed; the model is asked for at each connection.
"""

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping

import grpc
import structlog
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc, generation_pb2
from nanoinfer_common import names, tasks
from nanoinfer_common.errors import ServiceError, Violation, invalid, not_found_model, unavailable

from nanoinfer_gateway.upstreams.fleet import Connection, Fleet, Replica, Watching
from nanoinfer_gateway.upstreams.interruption import Silence

PROBE_SECONDS = 5.0
# the longest deadline that a server takes; the stream is then opened again
WATCH_SECONDS = 3600.0

Weights = Mapping[str, Counter[str]]

log = structlog.get_logger(__name__)


class EngineReplica(Replica):
    """One engine: its connection, its model and its load.

    `model` and `load` are None until they are known; `load` is None again while it is out of reach.
    """

    def __init__(self, target: str, watching: Watching) -> None:
        self.model: generation_pb2.ModelInfo | None = None
        self.load: engine_pb2.EngineLoad | None = None
        super().__init__(target, watching)

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
        in_flight = self.connection.num_in_flight
        amount = max(in_flight, reported) + load.waiting_requests + load.kv_cache_usage
        full = load.admission_state == engine_pb2.ADMISSION_STATE_FULL
        return full, amount, self.last_picked

    def _connected(self, connection: Connection) -> None:
        self.stub = engine_pb2_grpc.EngineServiceStub(connection.channel)

    def _lost(self) -> None:
        self.load = None

    async def _follow(self, connection: Connection, silence: Silence) -> None:
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
                silence.heard(self._patience(report))
                if model is None:
                    request = engine_pb2.EngineServiceGetModelInfoRequest()
                    described = await self.stub.GetModelInfo(request, timeout=PROBE_SECONDS)
                    model = self.model = _offered(described.model)
                self.load = report.load
                self._changed()
        except grpc.aio.AioRpcError as error:
            if model is None or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        finally:
            reports.cancel()

    def _patience(self, report: engine_pb2.EngineServiceWatchLoadResponse) -> float | None:
        """The longest silence, two intervals or more; None where it reports changes alone."""
        if not report.max_interval_ms:
            return None
        return max(self._watching.silence_seconds, 2 * report.max_interval_ms / 1000)


class Replicas(Fleet[EngineReplica]):
    """All engines, picked by model and load."""

    def __init__(
        self,
        resolve: Callable[[], Awaitable[Collection[str]]],
        interval: float,
        silence_seconds: float,
        on_change: Callable[[], None],
        report: tasks.Report,
        on_weights: Callable[[Weights], None],
    ) -> None:
        def open_replica(target: str, changed: Callable[[], None]) -> EngineReplica:
            return EngineReplica(target, Watching(silence_seconds, changed))

        super().__init__(resolve, interval, open_replica, on_change, report)
        self._on_weights = on_weights
        self._weights: Weights = {}

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

    def pick(self, model: str, tried: Collection[Connection] = ()) -> EngineReplica:
        """Return the less loaded of two random serving replicas; NO_ENGINE where there is none.

        Reports are up to 100 ms old: many gateways that all took the least loaded replica would
        rush upon it together (Mitzenmacher, "The power of two choices", 2001).
        """
        candidates = self._serving(model, tried)
        if not candidates:
            raise _no_engine()
        drawn = random.sample(candidates, min(2, len(candidates)))
        return self._picked(min(drawn, key=lambda candidate: candidate.rank))

    def has_other(self, model: str, tried: Collection[Connection]) -> bool:
        """Whether a serving replica is left that was not tried."""
        return bool(self._serving(model, tried))

    def _serving(self, model: str, tried: Collection[Connection]) -> list[EngineReplica]:
        return [
            replica
            for replica in self._candidates(tried)
            if replica.model is not None and replica.model.id == model
        ]

    def _changed(self) -> None:
        weights = self._served_weights()
        if weights != self._weights:
            for name, served in weights.items():
                if len(served) > 1 and served.keys() != self._weights.get(name, Counter()).keys():
                    log.warning("engines_differ_in_weights", model=name, replicas=dict(served))
            self._weights = weights
            self._on_weights(weights)
        super()._changed()

    def _served_weights(self) -> Weights:
        """How many replicas serve each model with which weights."""
        found: dict[str, Counter[str]] = {}
        for replica in self._candidates(()):
            if replica.model is not None and replica.model.weights_fingerprint:
                fingerprint = replica.model.weights_fingerprint.hex()
                found.setdefault(replica.model.id, Counter())[fingerprint] += 1
        return found


def _offered(model: generation_pb2.ModelInfo) -> generation_pb2.ModelInfo:
    """The engine's description with what the gateway does itself."""
    own = (generation_pb2.FEATURE_ECHO, generation_pb2.FEATURE_TRUNCATE_PROMPT)
    model.features.extend(each for each in own if each not in model.features)
    return model


def _no_engine() -> ServiceError:
    return unavailable(names.NO_ENGINE, "no engine takes requests", retry_after=1.0)
