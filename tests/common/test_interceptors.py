"""What a client, a span and a service see of every way in which an RPC can end."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer_common import errors, names
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.common.conftest import Probe, start_probe
from tests.common.probe import FULL_NAME, KINDS, call
from tests.waiting import DEADLINES

# request -> status code, ErrorInfo.reason, whether the server is at fault
OUTCOMES = {
    b"invalid": ("INVALID_ARGUMENT", "INVALID_SAMPLING_PARAMS", False),
    b"exhausted": ("RESOURCE_EXHAUSTED", "QUEUE_FULL", False),
    b"unavailable": ("UNAVAILABLE", "NO_ENGINE", True),
    b"not found": ("NOT_FOUND", "MODEL_NOT_FOUND", False),
    b"exception": ("INTERNAL", "INTERNAL", True),
    b"panic": ("INTERNAL", "INTERNAL", True),
    b"inner cancel": ("INTERNAL", "INTERNAL", True),
    b"abort": ("DATA_LOSS", "", True),
}


def spans_of(exporter: InMemorySpanExporter, kind: SpanKind) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.kind is kind]


def trailing(metadata: Any) -> dict[str, Any]:
    return dict(metadata)


async def server_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    while not (found := spans_of(exporter, SpanKind.SERVER)):
        await asyncio.sleep(0.01)
    (span,) = found
    return span


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("method", [*KINDS, "written"])
async def test_success_is_one_span_on_each_side(
    probe: Probe, spans: InMemorySpanExporter, method: str
) -> None:
    finished = await call(probe.channel, method, b"hello", metadata=(("x-request-id", "mine"),))
    span = await server_span(spans)
    host, _, port = probe.server.address.partition(":")
    assert span.name == f"{FULL_NAME}/{method}"
    assert span.status.status_code is StatusCode.UNSET
    seen = attributes(span)
    assert seen.pop("network.peer.port") > 0
    assert seen == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{FULL_NAME}/{method}",
        "rpc.response.status_code": "OK",
        "server.address": "127.0.0.1",
        "network.peer.address": "127.0.0.1",
        "nanoinfer.request.id": "mine",
    }
    (client,) = spans_of(spans, SpanKind.CLIENT)
    assert client.name == span.name
    assert attributes(client) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{FULL_NAME}/{method}",
        "rpc.response.status_code": "OK",
        "server.address": host,
        "server.port": int(port),
    }
    returned = trailing(await finished.trailing_metadata())
    assert returned["x-request-id"] == "mine"
    assert returned["x-trace-id"] == format(span.context.trace_id, "032x")


@pytest.mark.parametrize("method", [*KINDS, "written"])
@pytest.mark.parametrize("request_", OUTCOMES)
async def test_failures(
    probe: Probe, spans: InMemorySpanExporter, method: str, request_: bytes
) -> None:
    code, reason, fault = OUTCOMES[request_]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(probe.channel, method, request_, timeout=60)
    error = caught.value
    assert error.code().name == code
    assert "secret" not in f"{error.details()} {error.trailing_metadata()}"
    returned = errors.from_rpc_error(error)
    assert returned.reason == (reason or code)

    span = await server_span(spans)
    seen = attributes(span)
    assert seen["rpc.response.status_code"] == code
    assert seen["error.type"] == code
    assert seen.get("nanoinfer.error.reason", "") == reason
    assert (span.status.status_code is StatusCode.ERROR) is fault
    exceptions = [event for event in span.events if event.name == "exception"]
    assert len(exceptions) == (code == "INTERNAL")

    (client,) = spans_of(spans, SpanKind.CLIENT)
    assert client.status.status_code is StatusCode.ERROR
    assert attributes(client)["rpc.response.status_code"] == code
    assert attributes(client)["error.type"] == code

    # The server goes on, and nothing of the call is left.
    await call(probe.channel, method, b"again", timeout=60)
    assert probe.service.running == 0


async def test_internal_errors_name_the_request_and_log_the_details(
    probe: Probe, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(probe.channel, "unary_unary", b"panic", metadata=(("x-request-id", "mine"),))
    details = trailing(caught.value.trailing_metadata())[names.STATUS_DETAILS]
    assert b"google.rpc.RequestInfo" in details
    assert b"mine" in details
    assert caught.value.details() == "internal error"
    assert "a secret" in capsys.readouterr().out + caplog.text


async def test_exhausted_carries_retry_info_and_pushback(probe: Probe) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(probe.channel, "unary_unary", b"exhausted")
    assert errors.from_rpc_error(caught.value).retry_after == 1.5
    assert trailing(caught.value.trailing_metadata())[names.RETRY_PUSHBACK] == "1500"


@pytest.mark.parametrize("method", ["unary_unary", "unary_stream", "stream_stream"])
async def test_client_cancel(probe: Probe, spans: InMemorySpanExporter, method: str) -> None:
    running = asyncio.ensure_future(call(probe.channel, method, b"wait"))
    while not probe.service.num_waits:
        assert not running.done()
        await asyncio.sleep(0.01)
    running.cancel()
    span = await server_span(spans)
    assert attributes(span)["rpc.response.status_code"] == "CANCELLED"
    assert attributes(span)["error.type"] == "CANCELLED"
    assert span.status.status_code is StatusCode.UNSET
    (client,) = spans_of(spans, SpanKind.CLIENT)
    assert attributes(client)["rpc.response.status_code"] == "CANCELLED"
    assert probe.service.running == 0


@pytest.mark.parametrize("method", ["unary_unary", "unary_stream"])
async def test_client_deadline(probe: Probe, spans: InMemorySpanExporter, method: str) -> None:
    for seconds in DEADLINES:
        spans.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(probe.channel, method, b"wait", timeout=seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if probe.service.num_waits:
            break
    span = await server_span(spans)
    assert attributes(span)["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert span.status.status_code is StatusCode.ERROR
    assert probe.service.running == 0


@pytest.mark.parametrize("method", [*KINDS, "written"])
@pytest.mark.parametrize(
    ("limits", "timeout"),
    [
        ({"default_deadline_seconds": 0.2}, None),
        ({"default_deadline_seconds": 0.2, "max_deadline_seconds": 0.2}, 30),
    ],
)
async def test_the_server_sets_and_cuts_deadlines(
    spans: InMemorySpanExporter, method: str, limits: dict[str, float], timeout: float | None
) -> None:
    async with start_probe(**limits) as probe:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(probe.channel, method, b"wait", timeout=timeout)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert errors.from_rpc_error(caught.value).reason == "DEADLINE_EXCEEDED"
        span = await server_span(spans)
        assert attributes(span)["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
        assert probe.service.running == 0


async def test_a_deadline_within_the_limits_is_the_clients() -> None:
    async with start_probe(default_deadline_seconds=0.1, max_deadline_seconds=60) as probe:
        running = asyncio.ensure_future(call(probe.channel, "unary_unary", b"wait", timeout=30))
        await asyncio.sleep(0.3)
        probe.service.release.set()
        assert await (await running).code() is grpc.StatusCode.OK


async def test_a_reader_that_stops_reading_gives_everything_back(
    probe: Probe, spans: InMemorySpanExporter
) -> None:
    stream: Any = probe.channel.unary_stream(f"/{FULL_NAME}/unary_stream")
    running = stream(b"x" * 4_000_000)
    await running.read()
    await asyncio.sleep(0.1)
    running.cancel()
    span = await server_span(spans)
    assert attributes(span)["rpc.response.status_code"] in {"CANCELLED", "OK"}
    assert probe.service.running == 0
    assert probe.service.events[-1] == "closed"


async def test_watches_health_and_reflection_make_no_spans_and_get_no_deadline(
    spans: InMemorySpanExporter,
) -> None:
    async with start_probe(default_deadline_seconds=0.1) as probe:
        health = health_pb2_grpc.HealthStub(probe.channel)
        await health.Check(health_pb2.HealthCheckRequest())
        watch: Any = probe.channel.unary_stream(f"/{FULL_NAME}/WatchLoad")
        running = watch(b"")
        for _ in range(6):
            assert await running.read() == b"load"
        running.cancel()
        await asyncio.sleep(0.05)
        assert spans.get_finished_spans() == ()


@pytest.mark.matrix("R38")
async def test_unknown_methods_share_one_span_name(
    probe: Probe, spans: InMemorySpanExporter
) -> None:
    unknown: Any = probe.channel.unary_unary(f"/{FULL_NAME}/Nonsense")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unknown(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    span = await server_span(spans)
    assert span.name == "_OTHER"
    assert attributes(span)["rpc.method"] == "_OTHER"
    assert attributes(span)["rpc.method_original"] == f"{FULL_NAME}/Nonsense"
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("given", ["", "with space", "x" * 129, "naïve"])
async def test_an_unusable_request_id_is_replaced(probe: Probe, given: str) -> None:
    value = given.encode("utf-8") if not given.isascii() else given
    key = "x-request-id-bin" if isinstance(value, bytes) else "x-request-id"
    finished = await call(probe.channel, "unary_unary", b"ok", metadata=((key, value),))
    returned = trailing(await finished.trailing_metadata())["x-request-id"]
    assert len(returned) == 36
