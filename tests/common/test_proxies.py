"""No channel of ours goes through a proxy of the environment, loopback included."""

import ast
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from nanoinfer_common import telemetry
from nanoinfer_common.channels import open_channel
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import Counter

from tests.common.conftest import start_probe
from tests.common.probe import FULL_NAME
from tests.proxies import counting_proxy

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("services", "gateway", "clients/python/nanoinfer", "benchmarks")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.arrived = threading.Event()

    def Export(self, request: Any, context: Any) -> Any:
        self.arrived.set()
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_a_channel_between_services_uses_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_probe() as probe:
        with counting_proxy(monkeypatch) as proxy:
            async with open_channel(probe.server.address) as channel:
                unary: Any = channel.unary_unary(f"/{FULL_NAME}/unary_unary")
                assert await unary(b"hello", timeout=20) == b"hello"
            assert proxy.requests == []
            async with grpc.aio.insecure_channel(probe.server.address) as plain:
                with pytest.raises(grpc.aio.AioRpcError):
                    await plain.unary_unary(f"/{FULL_NAME}/unary_unary")(b"hello", timeout=20)
            assert proxy.requests, "a plain channel would have gone there"


@pytest.mark.parametrize("use_proxy", [False, True])
def test_spans_go_through_a_proxy_only_where_a_setting_says_so(
    monkeypatch: pytest.MonkeyPatch, use_proxy: bool
) -> None:
    caught: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", caught.append)
    monkeypatch.setattr(telemetry, "DROPPED_SPANS", Counter("own", "Own.", registry=None))
    servicer = Collector()
    with futures.ThreadPoolExecutor(2) as pool, counting_proxy(monkeypatch) as proxy:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        flush = telemetry.configure_tracing("nanoinfer-engine", use_proxy=use_proxy)
        caught[0].get_tracer("t").start_span("one").end()
        flush()
        assert servicer.arrived.is_set() is not use_proxy
        assert bool(proxy.requests) is use_proxy
        server.stop(None).wait()


def test_every_channel_that_is_opened_says_what_it_does_about_proxies() -> None:
    bare = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    num_needed = {"insecure_channel": 2, "secure_channel": 3}.get(node.func.attr, 0)
                    if len(node.args) + len(node.keywords) < num_needed:
                        bare.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert bare == []
