"""The tokenizer replicas: asked for their health again and again, taken in turn.

A replica serves while it answers, and answers that it does. The answer is its heartbeat.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer.v1 import tokenizer_pb2_grpc
from nanoinfer_common import names, tasks
from nanoinfer_common.errors import unavailable

from nanoinfer_gateway.upstreams.fleet import Connection, Fleet, Replica, Watching
from nanoinfer_gateway.upstreams.interruption import Silence

CHECKS_IN_SILENCE = 6  # so many questions go unanswered before a replica counts as silent
# a tokenizer without the health service, or without the name, answers and so is there
_ANSWERED = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND)


class TokenizerReplica(Replica):
    """One tokenizer: its connection and whether it said that it serves."""

    def __init__(self, target: str, watching: Watching) -> None:
        self._serving = False
        super().__init__(target, watching)

    @property
    def serving(self) -> bool:
        """Whether it takes requests."""
        return self._serving

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts replicas, best first: fewest requests there from here, longest not picked."""
        return self.connection.num_in_flight, self.last_picked

    def _connected(self, connection: Connection) -> None:
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(connection.channel)

    def _lost(self) -> None:
        self._serving = False

    async def _follow(self, connection: Connection, silence: Silence) -> None:
        patience = self._watching.silence_seconds
        health = health_pb2_grpc.HealthStub(connection.channel)
        while True:
            serving = await self._check(health)
            silence.heard(patience)
            if serving != self._serving:
                self._serving = serving
                self._changed()
            await asyncio.sleep(patience / CHECKS_IN_SILENCE)

    async def _check(self, health: health_pb2_grpc.HealthStub) -> bool:
        try:
            reply = await health.Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError as error:
            if error.code() in _ANSWERED:
                return True
            raise
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


class Tokenizers(Fleet[TokenizerReplica]):
    """All tokenizers, taken in turn."""

    def __init__(
        self,
        resolve: Callable[[], Awaitable[Collection[str]]],
        interval: float,
        silence_seconds: float,
        on_change: Callable[[], None],
        report: tasks.Report,
    ) -> None:
        def open_replica(target: str, changed: Callable[[], None]) -> TokenizerReplica:
            return TokenizerReplica(target, Watching(silence_seconds, changed))

        super().__init__(resolve, interval, open_replica, on_change, report)

    def pick(self, tried: Collection[Connection] = ()) -> TokenizerReplica:
        """Return the best of those not tried, or of all; TOKENIZER_UNAVAILABLE without any."""
        candidates = self._candidates(tried) or self._candidates(())
        if not candidates:
            message = "no tokenizer answers"
            raise unavailable(names.TOKENIZER_UNAVAILABLE, message, retry_after=1.0)
        return self._picked(min(candidates, key=lambda candidate: candidate.rank))

    def has_other(self, tried: Collection[Connection]) -> bool:
        """Whether a serving replica is left that was not tried."""
        return bool(self._candidates(tried))
