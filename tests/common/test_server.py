"""The server inside a program, and the status that services set."""

import asyncio
import contextlib
import importlib.metadata
import threading
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_common import errors
from nanoinfer_common.channels import open_channel
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.server import ServiceStatus, StartError, running

from tests.common.conftest import Probe, start_probe
from tests.common.probe import FULL_NAME, ProbeService, call
from tests.http2_frames import GOAWAY, HEADERS, Connection


async def health(channel: grpc.aio.Channel, name: str) -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.01)


async def test_states_and_health_names(probe: Probe) -> None:
    status = probe.server.status
    assert status.state == pb.SERVER_STATE_SERVING
    steps = [
        (status.set_stalled, pb.SERVER_STATE_STALLED, "NOT_SERVING"),
        (status.set_serving, pb.SERVER_STATE_SERVING, "SERVING"),
        (status.set_draining, pb.SERVER_STATE_DRAINING, "NOT_SERVING"),
        (status.set_serving, pb.SERVER_STATE_DRAINING, "NOT_SERVING"),
        (status.set_stalled, pb.SERVER_STATE_DRAINING, "NOT_SERVING"),
    ]
    for change, state, expected in steps:
        change()
        await settle()
        assert status.state == state
        for name in ("", FULL_NAME, "readiness"):
            assert await health(probe.channel, name) == expected
        assert await health(probe.channel, "liveness") == "SERVING"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(probe.channel, "unknown")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_states_can_be_set_from_threads(probe: Probe) -> None:
    thread = threading.Thread(target=probe.server.status.set_stalled)
    thread.start()
    await asyncio.to_thread(thread.join)
    await settle()
    assert await health(probe.channel, "readiness") == "NOT_SERVING"


async def test_a_failure_is_final(probe: Probe) -> None:
    status = probe.server.status
    status.fail(RuntimeError("first"))
    status.fail(RuntimeError("second"))
    status.set_serving()
    await asyncio.wait_for(status.failed.wait(), 60)
    assert str(status.failure) == "first"
    await settle()
    assert await health(probe.channel, "") == "NOT_SERVING"


async def test_server_info(probe: Probe) -> None:
    info: Any = probe.channel.unary_unary(f"/{FULL_NAME}/GetServerInfo")
    for change, state in [
        (probe.server.status.set_serving, pb.SERVER_STATE_SERVING),
        (probe.server.status.set_stalled, pb.SERVER_STATE_STALLED),
        (probe.server.status.set_draining, pb.SERVER_STATE_DRAINING),
    ]:
        change()
        server = pb.ServerInfo.FromString(await info(b""))
        assert server.state == state
        assert server.service == "nanoinfer-probe"
        assert server.version == importlib.metadata.version("nanoinfer")
        assert (server.schema_revision, server.min_client_revision) == (1, 1)
        assert server.uptime_ns > 0


async def test_the_service_is_started_drained_and_stopped_once() -> None:
    async with start_probe() as probe:
        assert probe.service.events == ["start"]
        service = probe.service
    assert service.events == ["start", "drain", "stop"]


async def test_a_start_that_fails_still_stops_the_service() -> None:
    made: list[ProbeService] = []

    class Broken(ProbeService):
        async def start(self) -> None:
            raise StartError("no model")

    def factory(status: ServiceStatus) -> ProbeService:
        made.append(Broken(status))
        return made[-1]

    with pytest.raises(StartError, match="no model"):
        async with running(factory, ServiceSettings()):
            raise AssertionError("must not be reached")
    assert made[0].events == ["stop"]


async def test_a_service_may_start_without_being_ready() -> None:
    class Waiting(ProbeService):
        async def start(self) -> None:
            self.status.set_stalled()

    async with (
        running(Waiting, ServiceSettings()) as server,
        open_channel(server.address) as channel,
    ):
        assert server.status.state == pb.SERVER_STATE_STALLED
        assert await health(channel, "readiness") == "NOT_SERVING"
        server.status.set_serving()
        await settle()
        assert await health(channel, "readiness") == "SERVING"


async def test_a_taken_port_is_a_start_error(probe: Probe) -> None:
    with pytest.raises(StartError, match="is the port in use"):
        async with start_probe(port=probe.server.port):
            raise AssertionError("must not be reached")


@pytest.mark.matrix("R66")
async def test_streams_beyond_the_drain_end_with_a_status() -> None:
    async with contextlib.AsyncExitStack() as outer:
        async with start_probe(drain_seconds=0.1) as probe:
            service = probe.service
            channel = await outer.enter_async_context(open_channel(probe.server.address))
            stream: Any = channel.unary_stream(f"/{FULL_NAME}/unary_stream")
            admitted = stream(b"wait")
            await admitted.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admitted.read()
    error = errors.from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert service.running == 0


@pytest.mark.matrix("R64")
async def test_a_drain_sends_a_client_away_before_it_refuses_its_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that heard sooner would repeat its call on the connection that refuses it."""
    monkeypatch.setattr("nanoinfer_common.server.SEND_AWAY_SECONDS", 2.0)
    async with start_probe(drain_seconds=60.0) as probe:
        connection = await Connection.open(probe.server.address)

        async def late() -> int:
            while probe.server.status.state != pb.SERVER_STATE_DRAINING:
                await asyncio.sleep(0.005)
            stream = connection.call(f"/{FULL_NAME}/unary_unary", b"late")
            while (HEADERS, stream) not in connection.frames:
                await asyncio.sleep(0.005)
            return stream

        calling = asyncio.create_task(late())
        connection.call(f"/{FULL_NAME}/unary_stream", b"wait")
        while not probe.service.num_waits:
            await asyncio.sleep(0.005)
        calling.add_done_callback(lambda _: probe.service.release.set())
    refusal = connection.frames.index((HEADERS, await calling))
    assert connection.frames.index((GOAWAY, 0)) < refusal
    assert "late" not in probe.service.events
    await connection.close()


@pytest.mark.parametrize("served", [True, False])
async def test_reflection(served: bool) -> None:
    async with start_probe(reflection=served) as probe:
        stub = reflection_pb2_grpc.ServerReflectionStub(probe.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        found = stub.ServerReflectionInfo(iter([request]))
        if served:
            (reply,) = [reply async for reply in found]
            names = {service.name for service in reply.list_services_response.service}
            assert {FULL_NAME, "grpc.health.v1.Health"} <= names
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [reply async for reply in found]
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.matrix("R70")
async def test_connections_are_renewed_by_age() -> None:
    async with start_probe(max_connection_age_seconds=0.2) as probe:
        stream: Any = probe.channel.unary_stream(f"/{FULL_NAME}/unary_stream")
        long = stream(b"wait")
        await long.read()
        for _ in range(8):
            await call(probe.channel, "unary_unary", b"x")
            await asyncio.sleep(0.1)
        assert len(probe.service.peers) > 1
        # The old stream outlives its connection's age.
        probe.service.release.set()
        assert await long.read() == b"wait"
        assert await long.code() is grpc.StatusCode.OK
