"""`trace` against a gateway in this process, its services' spans exported by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from nanoinfer.cli.app import app
from nanoinfer.cli.collector import Collector
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from typer.testing import CliRunner

from tests.client.fake_gateway import SUMMARY, Behaviour, finish
from tests.client.test_client import STREAM


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def export(collector: Collector, metadata: dict[str, Any], service: str) -> None:
    """A span of the service, below the caller's."""
    provider = TracerProvider(resource=Resource({"service.name": f"nanoinfer-{service}"}))
    exporter = OTLPSpanExporter(endpoint=f"http://{collector.address}", insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = TraceContextTextMapPropagator().extract(metadata)
    provider.get_tracer("t").start_span(f"work of {service}", parent).end()
    provider.shutdown()


def answering(collector: Collector, services: tuple[str, ...]) -> Any:
    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        metadata = dict(context.invocation_metadata())
        for service in services:
            # late, as a batch exporter is
            threading.Timer(0.3, export, (collector, metadata, service)).start()
        if request.text == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
        yield STREAM(finishes=[finish()], summary=SUMMARY)

    return stream


def run(target: str, collector: str, *arguments: str) -> Any:
    flags = ["trace", "--raw", "--target", target, "--collector", collector]
    return CliRunner().invoke(app, [*flags, *arguments])


SERVICES = ("gateway", "tokenizer", "engine")


def test_the_answer_then_the_spans(target: str, behaviour: Behaviour, collector: Collector) -> None:
    behaviour.stream = answering(collector, SERVICES)
    result = run(target, collector.address, "x")
    assert result.exit_code == 0, result.output
    assert "→ GatewayService/GenerateStream" in result.stdout
    for service in SERVICES:
        assert f"work of {service}" in result.stdout
    parent = str(behaviour.arrivals[0].metadata["traceparent"])
    assert f"trace {parent.split('-')[1]}" in result.stdout


def test_json(target: str, behaviour: Behaviour, collector: Collector) -> None:
    behaviour.stream = answering(collector, SERVICES)
    found = json.loads(run(target, collector.address, "--json", "x").stdout)
    assert found["completion"]["choices"][0]["finish_reason"] == "stop"
    services = {span["service"] for span in found["spans"]}
    assert services == {"nanoinfer-cli", *(f"nanoinfer-{name}" for name in SERVICES)}
    by_id = {span["span_id"] for span in found["spans"]}
    assert sum(span["parent_id"] in by_id for span in found["spans"]) == 3


def test_a_refused_request_is_drawn_too(
    target: str, behaviour: Behaviour, collector: Collector
) -> None:
    behaviour.stream = answering(collector, ("gateway",))
    result = run(target, collector.address, "bad")
    assert result.exit_code == 4
    assert "work of gateway" in result.stdout
    assert "status=INVALID_ARGUMENT" in result.stdout
    assert "refused" in result.stderr


def test_no_collector(target: str) -> None:
    result = run(target, "127.0.0.1:1", "x")
    assert result.exit_code == 1
    assert "no spans from 127.0.0.1:1" in result.stderr
    unknown = CliRunner().invoke(app, ["trace", "--target", target, "x"])
    assert unknown.exit_code == 2
    assert "--collector" in unknown.stderr
