"""Connections that are half open, idle, silent, or too many for the process's descriptors."""

import asyncio
import json
import resource
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from nanoinfer_common import channels, server
from nanoinfer_common.channels import open_channel

from tests.common.conftest import start_probe
from tests.common.probe import FULL_NAME, call
from tests.common.test_lifecycle import start_process
from tests.proxy import Proxy

PATIENCE = 120.0  # ends a test that hangs
BEFORE_GRPC_WOULD = 50.0  # it waits 60 s for the answer to a ping if not told otherwise


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


async def status_of(channel: grpc.aio.Channel, request: bytes) -> grpc.StatusCode:
    unary: Any = channel.unary_unary(f"/{FULL_NAME}/unary_unary")
    code: grpc.StatusCode = await unary(request, timeout=PATIENCE, wait_for_ready=True).code()
    return code


# --- half open ---


@pytest.mark.matrix("R70")
async def test_a_stream_on_a_half_open_connection_ends_and_the_next_call_finds_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels, "KEEPALIVE_MILLISECONDS", 1000)
    monkeypatch.setattr(channels, "KEEPALIVE_TIMEOUT_MILLISECONDS", 5000)
    async with (
        start_probe(drain_seconds=0.0) as probe,
        Proxy().to(probe.server.address) as proxy,
        open_channel(proxy.address) as channel,
    ):
        stream: Any = channel.unary_stream(f"/{FULL_NAME}/unary_stream")(b"wait")
        assert await stream.read() == b"first"
        proxy.fall_silent()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(stream.read(), BEFORE_GRPC_WOULD)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # The dying connection may take one call more with it; UNAVAILABLE is there to be repeated.
        async with asyncio.timeout(PATIENCE):
            while await status_of(channel, b"again") is grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0.05)
        assert proxy.num_connections >= 2
        assert probe.service.events == ["start", "again"]


# --- idle and silent ---


@pytest.mark.matrix("R76")
async def test_an_idle_connection_is_closed_and_made_again_for_the_next_call() -> None:
    async with start_probe(max_connection_idle_seconds=0.3) as probe:
        await call(probe.channel, "unary_unary", b"one")
        idle = grpc.ChannelConnectivity.IDLE
        await eventually(lambda: probe.channel.get_state() is idle)
        await call(probe.channel, "unary_unary", b"two", timeout=PATIENCE)
        assert len(probe.service.peers) == 2


@pytest.mark.matrix("R76")
async def test_a_running_stream_is_not_idle() -> None:
    async with start_probe(max_connection_idle_seconds=0.2) as probe:
        stream: Any = probe.channel.unary_stream(f"/{FULL_NAME}/unary_stream")(b"wait")
        assert await stream.read() == b"first"
        await asyncio.sleep(0.6)
        probe.service.release.set()
        assert await stream.read() == b"wait"


@pytest.mark.matrix("R76")
async def test_a_connection_that_never_speaks_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_MILLISECONDS", 300)
    async with start_probe() as probe:
        reader, writer = await asyncio.open_connection("127.0.0.1", probe.server.port)
        async with asyncio.timeout(PATIENCE):
            while await reader.read(4096):
                pass
        writer.close()
        await call(probe.channel, "unary_unary", b"fine")


# --- out of descriptors ---


async def metrics_port(process: Any) -> int:
    """Read from the log, where it stands from the start on."""
    while True:
        line = await asyncio.to_thread(process.stderr.readline)
        assert line, "the process has ended"
        if port := json.loads(line).get("metrics_port"):
            return int(port)


@pytest.mark.matrix("R76")
async def test_without_descriptors_old_connections_go_on_and_new_ones_wait(tmp_path: Path) -> None:
    async with start_process(tmp_path, "--metrics-port", "0") as started:
        await started.become("", "SERVING")
        scraped = await metrics_port(started.process)
        port = int(started.address.rpartition(":")[2])
        probe = psutil.Process(started.process.pid)
        await call(started.channel, "unary_unary", b"one")
        most = probe.num_fds() + 8
        resource.prlimit(probe.pid, resource.RLIMIT_NOFILE, (most, most))
        with ExitStack() as stack:
            for _ in range(16):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            await eventually(lambda: probe.num_fds() == most)
            stack.enter_context(socket.create_connection(("127.0.0.1", scraped)))
            own = [("grpc.use_local_subchannel_pool", 1)]  # and so a connection of its own
            async with grpc.aio.insecure_channel(started.address, own) as channel:
                new = asyncio.ensure_future(
                    call(channel, "unary_unary", b"new", timeout=PATIENCE, wait_for_ready=True)
                )
                cpu, start = probe.cpu_times(), time.monotonic()
                for _ in range(10):
                    await call(started.channel, "unary_unary", b"old", timeout=PATIENCE)
                    await asyncio.sleep(0.1)
                after = probe.cpu_times()
                # Those who cannot accept wait for it and do not try again and again.
                spent = after.user + after.system - cpu.user - cpu.system
                assert spent < (time.monotonic() - start) / 2
                assert not new.done()
                stack.close()
                await new
            reader, writer = await asyncio.open_connection("127.0.0.1", scraped)
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert b"200 OK" in await asyncio.wait_for(reader.readline(), PATIENCE)
            writer.close()
        started.terminate()
        assert await asyncio.to_thread(started.process.wait, PATIENCE) == 0
