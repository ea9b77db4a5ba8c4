"""Background tasks that fail: logged, started again, shown in health."""

import asyncio

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer_common import tasks

from tests.common.conftest import Probe


async def readiness(channel: grpc.aio.Channel) -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


async def become(channel: grpc.aio.Channel, wanted: str) -> None:
    async with asyncio.timeout(60):
        while await readiness(channel) != wanted:
            await asyncio.sleep(0.01)


async def test_a_task_that_fails_is_logged_and_started_again_and_health_shows_it(
    probe: Probe,
) -> None:
    may_run = asyncio.Event()
    num_starts = 0

    async def work() -> None:
        nonlocal num_starts
        num_starts += 1
        if not may_run.is_set():
            raise ValueError("unexpected")
        await asyncio.Event().wait()

    status = probe.server.status
    with structlog.testing.capture_logs() as lines:
        task = tasks.keep_running("the work", work, status.set_fault, min_delay=0.01)
        await become(probe.channel, "NOT_SERVING")
        async with asyncio.timeout(60):
            while num_starts < 3:
                await asyncio.sleep(0.01)
        failures = [line for line in lines if line["event"] == "background task failed"]
        assert {line["task"] for line in failures} == {"the work"}
        assert isinstance(failures[0]["exc_info"], ValueError)
        delays = [line["retry_seconds"] for line in failures]
        assert delays == sorted(delays)
        assert delays[0] < delays[-1]
        may_run.set()
        await become(probe.channel, "SERVING")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_the_delay_between_two_starts_has_a_bound(probe: Probe) -> None:
    async def work() -> None:
        raise ValueError("unexpected")

    with structlog.testing.capture_logs() as lines:
        task = tasks.keep_running(
            "x", work, probe.server.status.set_fault, min_delay=0.001, max_delay=0.004
        )
        async with asyncio.timeout(60):
            while len(lines) < 8:
                await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    found = [line["retry_seconds"] for line in lines if "retry_seconds" in line]
    assert found[:4] == [0.001, 0.002, 0.004, 0.004]
    assert await readiness(probe.channel) == "NOT_SERVING"


async def test_a_task_that_ends_where_it_should_not_is_started_again() -> None:
    num_starts = 0

    async def work() -> None:
        nonlocal num_starts
        num_starts += 1

    told: list[tuple[str, bool]] = []
    task = tasks.keep_running("x", work, lambda *said: told.append(said), min_delay=0.001)
    async with asyncio.timeout(60):
        while num_starts < 3:
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert told[0] == ("x", True)


async def test_one_fault_of_two_keeps_health_from_serving(probe: Probe) -> None:
    status = probe.server.status
    status.set_fault("one", True)
    status.set_fault("two", True)
    await become(probe.channel, "NOT_SERVING")
    status.set_fault("one", False)
    assert await readiness(probe.channel) == "NOT_SERVING"
    status.set_fault("two", False)
    await become(probe.channel, "SERVING")


async def test_a_task_that_nobody_awaits_logs_what_it_raises() -> None:
    async def work() -> None:
        raise ValueError("unexpected")

    with structlog.testing.capture_logs() as lines:
        task = tasks.start("once", work())
        await asyncio.wait([task])
        await asyncio.sleep(0)
    assert [(line["event"], line["task"]) for line in lines] == [("background task failed", "once")]


async def test_a_cancelled_task_logs_nothing() -> None:
    with structlog.testing.capture_logs() as lines:
        task = tasks.start("once", asyncio.sleep(60))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert lines == []
