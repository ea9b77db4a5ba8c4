"""Fixtures of the common room: collected spans and a probe server in this event loop."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import pytest
from nanoinfer_common import telemetry
from nanoinfer_common.channels import open_channel
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.server import RunningServer, ServiceStatus, running
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.common.probe import ProbeService


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NANOINFER_PORT", "NANOINFER_HOST", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Collects the spans of a test; the process's own provider stays as it is."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


@dataclass
class Probe:
    server: RunningServer
    service: ProbeService
    channel: grpc.aio.Channel


class StartProbe(Protocol):
    def __call__(self, **settings: Any) -> Any: ...


@asynccontextmanager
async def start_probe(**settings: Any) -> AsyncIterator[Probe]:
    """Runs the probe on a free port, with a channel to it."""
    made: list[ProbeService] = []

    def factory(status: ServiceStatus) -> ProbeService:
        made.append(ProbeService(status))
        return made[-1]

    chosen = ServiceSettings(**{"drain_seconds": 0.2, **settings})
    async with (
        running(factory, chosen) as server,
        open_channel(server.address) as channel,
    ):
        yield Probe(server, made[0], channel)


@pytest.fixture
async def probe() -> AsyncIterator[Probe]:
    async with start_probe() as started:
        yield started
