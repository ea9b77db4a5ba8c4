"""What tells others that the engine is alive: load reports, and a watchdog that does not die."""

from __future__ import annotations

import asyncio

import pytest
import structlog
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import generation_pb2 as pb

from tests.engine.control.conftest import Message, StartFake

TEN = pb.StoppingParams(max_tokens=10)


async def test_watch_load_sends_at_once_and_on_change(start_fake: StartFake) -> None:
    async with start_fake(load_report_seconds=600) as fake:
        watch = fake.stub.WatchLoad(engine_pb2.EngineServiceWatchLoadRequest())
        first = await asyncio.wait_for(watch.read(), 60)
        assert first.load == engine_pb2.EngineLoad(admission_state=engine_pb2.ADMISSION_STATE_OPEN)
        fake.runner.gate.clear()
        call = fake.call(stopping=TEN)
        while (changed := await asyncio.wait_for(watch.read(), 60)).load.running_requests == 0:
            pass
        assert changed.load.kv_cache_usage > 0
        fake.runner.gate.set()
        await _rest(call)
        while (changed := await asyncio.wait_for(watch.read(), 60)).load.running_requests:
            pass
        assert changed.load == first.load
        with pytest.raises(asyncio.TimeoutError):  # nothing changes, nothing comes
            await asyncio.wait_for(watch.read(), 0.4)
        watch.cancel()


@pytest.mark.matrix("R59")
async def test_the_load_is_reported_again_and_again_without_a_change(start_fake: StartFake) -> None:
    async with start_fake(load_report_seconds=0.05) as fake:
        watch = fake.stub.WatchLoad(engine_pb2.EngineServiceWatchLoadRequest(), timeout=60)
        reports = [await watch.read() for _ in range(5)]
        assert {report.max_interval_ms for report in reports} == {50}
        assert all(report.load == reports[0].load for report in reports)
        watch.cancel()


async def test_reports_go_on_while_a_step_hangs(start_fake: StartFake) -> None:
    async with start_fake(load_report_seconds=0.05) as fake:
        fake.runner.gate.clear()
        call = fake.call(stopping=TEN)
        watch = fake.stub.WatchLoad(engine_pb2.EngineServiceWatchLoadRequest(), timeout=60)
        while not (await watch.read()).load.running_requests:
            pass
        reports = [await watch.read() for _ in range(4)]
        assert all(report.load.running_requests == 1 for report in reports)
        fake.runner.gate.set()
        assert await _rest(call)
        watch.cancel()


async def test_a_watchdog_that_fails_is_started_again(
    start_fake: StartFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_fake(stall_seconds=0.1) as engine:
        told: list[bool] = []
        stalled = engine.service.stalled

        def fail_first(is_stalled: bool) -> None:
            told.append(is_stalled)
            if len(told) == 1:
                raise ValueError("unexpected")
            stalled(is_stalled)

        monkeypatch.setattr(engine.service, "stalled", fail_first)
        with structlog.testing.capture_logs() as lines:
            engine.runner.gate.clear()
            call = engine.call(stopping=TEN)
            async with asyncio.timeout(60):
                while engine.server.status.state != pb.SERVER_STATE_STALLED:
                    await asyncio.sleep(0.01)
            engine.runner.gate.set()
            async with asyncio.timeout(60):
                while engine.server.status.state != pb.SERVER_STATE_SERVING:
                    await asyncio.sleep(0.01)
        assert told == [True, True, False]
        failures = [line for line in lines if line["event"] == "background task failed"]
        assert [line["task"] for line in failures] == ["watchdog"]
        assert await _rest(call)


async def _rest(call: object) -> list[Message]:
    """What the call still brings."""
    return [message async for message in call]  # type: ignore[attr-defined]
