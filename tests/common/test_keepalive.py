"""Pings of clients on raw HTTP/2 connections: 10 s apart is fine, a flood is not."""

import asyncio

import pytest
from nanoinfer_common import server

from tests.common.conftest import start_probe
from tests.http2_frames import Connection


async def test_pings_without_calls_that_keep_the_interval_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MIN_PING_INTERVAL_MILLISECONDS", 50)
    async with start_probe() as probe:
        connection = await Connection.open(probe.server.address)
        for _ in range(8):
            assert await connection.ping(), connection.goaway
            await asyncio.sleep(0.1)
        await connection.close()


async def test_a_flood_of_pings_ends_its_connection_alone() -> None:
    async with start_probe() as probe:
        flood, calm = [await Connection.open(probe.server.address) for _ in range(2)]
        answers = [await flood.ping() for _ in range(6)]
        assert answers[0]
        assert not answers[-1]
        assert b"too_many_pings" in flood.goaway
        assert await calm.ping()
        for connection in (flood, calm):
            await connection.close()


def test_the_interval_leaves_room_for_clients_that_ping_every_ten_seconds() -> None:
    assert 1000 <= server.MIN_PING_INTERVAL_MILLISECONDS <= 5000


@pytest.mark.slow
async def test_a_client_that_pings_every_ten_seconds_stays() -> None:
    async with start_probe() as probe:
        connection = await Connection.open(probe.server.address)
        for _ in range(5):
            assert await connection.ping(), connection.goaway
            await asyncio.sleep(10)
        assert await connection.ping(), connection.goaway
        await connection.close()
