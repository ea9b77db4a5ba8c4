"""The service: upstreams, core and faces put together, started and stopped."""

from functools import partial

import grpc
from nanoinfer.v1 import gateway_pb2_grpc
from nanoinfer_common.status import ServiceStatus
from nanoinfer_common.stream_writes import StreamWriter, WriteSlots

from nanoinfer_gateway.core.admission import Bounds
from nanoinfer_gateway.core.gateway import Gateway, Sizes
from nanoinfer_gateway.core.generation import Upstreams
from nanoinfer_gateway.core.metrics import GatewayMetrics
from nanoinfer_gateway.core.vocabulary import Vocabularies
from nanoinfer_gateway.faces.grpc import GrpcFace
from nanoinfer_gateway.settings import GatewaySettings
from nanoinfer_gateway.upstreams import addresses
from nanoinfer_gateway.upstreams.readiness import Readiness
from nanoinfer_gateway.upstreams.replicas import Replicas
from nanoinfer_gateway.upstreams.routing import Engines, Tokenizer
from nanoinfer_gateway.upstreams.tokenizers import Tokenizers


class GatewayService:
    """The gateway as a service of `nanoinfer_common.server`; made inside the event loop.

    It is ready while at least one tokenizer and one engine serve. Without them health says
    NOT_SERVING and the state STALLED, but nothing is refused for it: requests are told what lacks.
    """

    name = "nanoinfer-gateway"
    full_name = "nanoinfer.v1.GatewayService"

    def __init__(self, settings: GatewaySettings, status: ServiceStatus) -> None:
        metrics = GatewayMetrics()
        self.registry = metrics.registry
        self._settings = settings
        self._status = status
        self._tokenizers = Tokenizers(
            partial(addresses.resolve, settings.tokenizer),
            settings.resolve_seconds,
            settings.silence_seconds,
            lambda: self._readiness.update(),
            partial(self._report_fault, "tokenizers"),
        )
        self._replicas = Replicas(
            partial(addresses.resolve, settings.engine),
            settings.resolve_seconds,
            settings.silence_seconds,
            lambda: self._readiness.update(),
            partial(self._report_fault, "engines"),
            metrics.weights,
        )
        self._readiness = Readiness(
            lambda: self._tokenizers.any_serving,
            lambda: self._replicas.any_serving,
            self._report_readiness,
        )
        tokenizer = Tokenizer(
            self._tokenizers, settings.tokenizer_timeout_seconds, metrics.upstream
        )
        self._vocabularies = Vocabularies(tokenizer.vocabulary)
        engines = Engines(self._replicas, metrics.upstream)
        self.gateway = Gateway(
            Upstreams(tokenizer, engines, self._vocabularies.get),
            self._replicas,
            _bounds(settings),
            _sizes(settings),
            metrics,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the handlers."""
        slots = WriteSlots(self._settings.num_write_slots)
        writer = StreamWriter(self._settings.stall_seconds)
        face = GrpcFace(self.gateway, self._settings, self._status, slots, writer)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(face, server)

    async def start(self) -> None:
        """Connect. Ready comes later, once upstreams serve."""
        if not self._settings.ready_without_upstreams:
            self._status.set_stalled()
        await self._tokenizers.start()
        await self._replicas.start()

    async def drain(self, seconds: float) -> None:
        """Nothing to do: the server lets running calls finish, and nothing outlives its call."""

    async def stop(self) -> None:
        """Close every channel and end every background task."""
        await self._vocabularies.close()
        await self._replicas.stop()
        await self._tokenizers.stop()

    def _report_readiness(self, is_ready: bool) -> None:
        if is_ready:
            self._vocabularies.prefetch()
            self._status.set_serving()
        elif not self._settings.ready_without_upstreams:
            self._status.set_stalled()

    def _report_fault(self, what: str, task: str, is_faulty: bool) -> None:
        self._status.set_fault(f"{what}: {task}", is_faulty)


def _bounds(settings: GatewaySettings) -> Bounds:
    return Bounds(
        max_requests=settings.max_requests,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_prompt_bytes=settings.max_prompt_bytes,
        max_tenant_requests=settings.max_tenant_requests,
    )


def _sizes(settings: GatewaySettings) -> Sizes:
    return Sizes(
        max_prompt_bytes=settings.max_request_prompt_bytes,
        max_answer_bytes=settings.max_answer_bytes,
        max_buffered_bytes=settings.max_buffered_bytes,
    )
