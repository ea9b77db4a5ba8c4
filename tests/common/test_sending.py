"""Answers on their way out: headers, statuses after messages that nobody takes, and their bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from nanoinfer_common import errors, names

from tests.common.conftest import start_probe
from tests.common.probe import FULL_NAME, Panic, call
from tests.http2 import connect

LONG = 60.0  # ends a test that hangs; nothing is measured by it
DEADLINE = str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


@pytest.mark.matrix("R45")
@pytest.mark.parametrize("method", ["unary_unary", "unary_stream", "written", "stream_stream"])
async def test_a_status_follows_a_first_message_that_nobody_took(method: str) -> None:
    """The server's own deadline ends the call in its first write; so would a drain."""
    async with (
        start_probe(default_deadline_seconds=0.2) as probe,
        connect(probe.server.address, window=0) as client,
    ):
        stream_id = await client.call(f"{FULL_NAME}/{method}", b"hi", ("x-request-id", "mine"))
        await eventually(lambda: bool(client.stream(stream_id).headers))
        await asyncio.sleep(0.4)  # the deadline passes with the message unsent
        assert not client.stream(stream_id).data
        client.widen(stream_id, 1000)
        await asyncio.wait_for(client.stream(stream_id).ended.wait(), LONG)
        assert client.stream(stream_id).trailers["grpc-status"] == DEADLINE
        assert client.stream(stream_id).trailers["x-request-id"] == "mine"


async def test_bytes_that_nobody_takes_count_until_their_client_leaves() -> None:
    async with start_probe(max_unsent_bytes=2000, default_deadline_seconds=0.2) as probe:
        async with connect(probe.server.address, window=0) as client:
            for _ in range(3):
                stream_id = await client.call(f"{FULL_NAME}/unary_unary", b"x" * 1000)
                await eventually(lambda: bool(client.stream(stream_id).headers))  # noqa: B023
            await asyncio.sleep(0.4)  # given up, but still with gRPC
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(probe.channel, "unary_unary", b"hi")
            refused = errors.from_rpc_error(raised.value)
            assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refused.reason == "QUEUE_FULL"
            assert refused.retry_after is not None
            await call(probe.channel, "GetServerInfo", b"")  # says how it is all the same
        await eventually_taken(probe)


async def eventually_taken(probe: Any) -> None:
    async with asyncio.timeout(LONG):
        while True:
            unary: Any = probe.channel.unary_unary(f"/{FULL_NAME}/unary_unary")
            code = await unary(b"hi").code()
            if code is grpc.StatusCode.OK:
                return
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            await asyncio.sleep(0.01)


async def test_a_refusal_has_no_headers_so_that_clients_repeat_it_elsewhere() -> None:
    async with start_probe() as probe, connect(probe.server.address) as client:
        stream_id = await client.call(f"{FULL_NAME}/unary_stream", b"unavailable")
        await asyncio.wait_for(client.stream(stream_id).ended.wait(), LONG)
        # "first" has been sent before; the same from the unary method has nothing before it.
        assert client.stream(stream_id).trailers is not client.stream(stream_id).headers
        stream_id = await client.call(f"{FULL_NAME}/unary_unary", b"unavailable")
        await asyncio.wait_for(client.stream(stream_id).ended.wait(), LONG)
        assert client.stream(stream_id).trailers is client.stream(stream_id).headers


async def test_an_answer_that_cannot_be_written_is_internal() -> None:
    async with start_probe() as probe:

        async def act(request: bytes, context: Any) -> None:
            raise Panic

        probe.service.act = act  # type: ignore[method-assign]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(probe.channel, "unary_unary", b"hi", metadata=(("x-request-id", "mine"),))
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        assert dict(raised.value.trailing_metadata() or ())[names.REQUEST_ID] == "mine"


@pytest.mark.matrix("R38")
async def test_a_method_that_does_not_exist_is_refused_with_the_request_id() -> None:
    async with start_probe() as probe:
        for kind in ("unary_unary", "unary_stream"):
            unknown: Any = getattr(probe.channel, kind)(f"/{FULL_NAME}/Missing")
            refused = unknown(b"hi", metadata=(("x-request-id", "mine"),))
            assert await refused.code() is grpc.StatusCode.UNIMPLEMENTED
            trailing = dict(await refused.trailing_metadata())
            assert trailing[names.REQUEST_ID] == "mine"
            assert b"UNKNOWN_METHOD" in trailing[names.STATUS_DETAILS]


@pytest.mark.matrix("R42")
@pytest.mark.parametrize("method", ["unary_stream", "written"])
async def test_a_client_that_resets_its_connection_ends_its_calls(method: str) -> None:
    async with start_probe() as probe:
        async with connect(probe.server.address) as client:
            for _ in range(5):
                await client.call(f"{FULL_NAME}/{method}", b"wait")
            await eventually(lambda: sum(bool(s.data) for s in client.streams) == 5)
            await client.vanish()
            await call(probe.channel, method, b"others go on")
            if method == "unary_stream":
                await eventually(lambda: probe.service.running == 0)
                assert probe.service.events.count("closed") == 6
        await eventually(lambda: probe.service.running == 0)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not holds():
            await asyncio.sleep(0.005)
