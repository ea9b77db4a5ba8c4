"""One stack on the shipped model for the whole session, with a collector in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.e2e.stack import Stack, start_stack

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "models" / "guide"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps every span with the service that sent it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[str, trace_pb2.Span]] = []

    def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.ServicerContext,
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                names = [
                    a.value.string_value
                    for a in resource.resource.attributes
                    if a.key == "service.name"
                ]
                for scope in resource.scope_spans:
                    self._spans.extend((names[0], span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: bytes) -> list[tuple[str, trace_pb2.Span]]:
        with self._lock:
            return [(service, span) for service, span in self._spans if span.trace_id == trace_id]

    def await_trace(
        self, trace_id: bytes, num_spans: int, seconds: float = 60
    ) -> list[tuple[str, trace_pb2.Span]]:
        """The trace's spans once there are `num_spans`, or whatever has come by then."""
        end = time.monotonic() + seconds
        while len(self.trace(trace_id)) < num_spans and time.monotonic() < end:
            time.sleep(0.05)
        return self.trace(trace_id)


@pytest.fixture(scope="session")
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(scope="session")
def stack(
    collector: tuple[Collector, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector[1],
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with start_stack(
        GUIDE,
        tmp_path_factory.mktemp("stack"),
        engine_flags=["--max-batch-tokens", "64"],
        gateway_flags=["--trust-incoming-trace"],
        environment=environment,
    ) as running:
        yield running


@pytest.fixture
def gateway(stack: Stack) -> Iterator[gateway_pb2_grpc.GatewayServiceStub]:
    with grpc.insecure_channel(stack.gateway.address) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


@pytest.fixture
def engine(stack: Stack) -> Iterator[engine_pb2_grpc.EngineServiceStub]:
    with grpc.insecure_channel(stack.engine.address) as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)


def await_idle(engine: engine_pb2_grpc.EngineServiceStub, seconds: float = 60.0) -> None:
    """Waits until the engine holds no block and no request; fails where it keeps one."""
    end = time.monotonic() + seconds
    while True:
        load = engine.GetLoad(engine_pb2.EngineServiceGetLoadRequest(), timeout=5).load
        if not (load.kv_cache_usage or load.running_requests or load.waiting_requests):
            return
        if time.monotonic() > end:
            raise AssertionError(f"still busy after {seconds} s: {load}")
        time.sleep(0.01)
