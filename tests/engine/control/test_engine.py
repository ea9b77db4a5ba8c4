"""The engine thread and the event loop together, with a fake runner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from nanoinfer_engine.core.engine import Engine
from nanoinfer_engine.core.errors import (
    CapacityError,
    DrainingError,
    EngineLostError,
    NotReadyError,
    QueueFullError,
    StalledReaderError,
    is_device_error,
)
from nanoinfer_engine.core.request import FinishReason, RequestOutput
from nanoinfer_engine.core.stream import Stream
from nanoinfer_engine.core.watchdog import Patience
from nanoinfer_engine.server.metrics import make_statistics

from tests.engine.fakes import (
    FakeListener,
    FakeRunner,
    expected_tokens,
    make_config,
    make_request,
    pieces,
)


class Harness:
    def __init__(self, runner: FakeRunner, patience: Patience | None, **changes: object) -> None:
        self.runner = runner
        self.listener = FakeListener([])
        self.engine = Engine(
            make_config(**changes), lambda: runner, make_statistics, self.listener, patience
        )

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come to pass"
            await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Everything ended, and every block is free again."""
        await self.until(lambda: self.engine.load.num_running + self.engine.load.num_waiting == 0)
        assert self.engine.load.kv_usage == 0

    def check_balance(self) -> None:
        snapshot = self.engine.statistics
        assert snapshot.counters["accepted"] == sum(snapshot.finished.values())


@asynccontextmanager
async def serving(
    runner: FakeRunner | None = None, patience: Patience | None = None, **changes: object
) -> AsyncIterator[Harness]:
    harness = Harness(runner or FakeRunner(), patience, **changes)
    await harness.engine.start()
    try:
        yield harness
    finally:
        harness.runner.gate.set()
        await harness.engine.stop()


async def collect(stream: Stream) -> list[RequestOutput]:
    return [output async for outputs in pieces(stream) for output in outputs]


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens]


async def test_streams_the_tokens_of_one_request() -> None:
    async with serving() as harness:
        outputs = await collect(harness.engine.submit([make_request(max_tokens=20)]))
        assert tokens(outputs) == expected_tokens([11, 12, 13], 20)
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        await harness.idle()
        harness.check_balance()


async def test_many_requests_share_steps_and_each_gets_its_own_tokens() -> None:
    async with serving(max_waiting_requests=40) as harness:
        prompts = [[20 + i, 30 + i, 40 + i] for i in range(30)]
        streams = [harness.engine.submit([make_request(prompt, 12)]) for prompt in prompts]
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        assert [tokens(r) for r in results] == [expected_tokens(prompt, 12) for prompt in prompts]
        assert max(len(batch.rows) for batch in harness.runner.batches) == 4
        await harness.idle()
        harness.check_balance()


async def test_completions_of_one_request_arrive_in_one_stream() -> None:
    async with serving() as harness:
        requests = [make_request(max_tokens=5, seed=seed, index=seed) for seed in range(3)]
        outputs = await collect(harness.engine.submit(requests))
        for index in range(3):
            own = [output for output in outputs if output.request.index == index]
            assert tokens(own) == expected_tokens([11, 12, 13], 5, seed=index)


async def test_closing_a_stream_frees_its_blocks_within_one_step() -> None:
    async with serving(FakeRunner(step_seconds=0.01)) as harness:
        stream = harness.engine.submit([make_request(max_tokens=200)])
        assert await stream.wait()
        num_steps = len(harness.runner.batches)
        stream.close()
        await harness.idle()
        assert len(harness.runner.batches) <= num_steps + 2
        assert harness.engine.statistics.finished[FinishReason.CANCELLED] == 1
        assert not await stream.wait()


async def test_cancel_before_the_engine_saw_the_request() -> None:
    async with serving() as harness:
        stream = harness.engine.submit([make_request()])
        stream.close()
        await harness.until(lambda: sum(harness.engine.statistics.finished.values()) == 1)
        await harness.idle()
        harness.check_balance()


@pytest.mark.matrix("R43")
async def test_a_cancel_during_the_last_step_wins_over_its_output() -> None:
    async with serving() as harness:
        harness.runner.gate.clear()
        stream = harness.engine.submit([make_request(max_tokens=1)])
        await harness.until(lambda: bool(harness.runner.batches))
        stream.close()
        harness.runner.gate.set()
        await harness.idle()
        assert harness.engine.statistics.finished[FinishReason.CANCELLED] == 1
        assert harness.engine.statistics.finished[FinishReason.LENGTH] == 0


@pytest.mark.matrix("R46")
async def test_a_deadline_ends_a_running_request_at_the_next_step() -> None:
    async with serving(FakeRunner(step_seconds=0.01)) as harness:
        deadline = time.monotonic_ns() + 50_000_000
        outputs = await collect(
            harness.engine.submit([make_request(max_tokens=200, deadline=deadline)])
        )
        assert outputs[-1].finish_reason is FinishReason.DEADLINE
        times = outputs[-1].request.times
        assert times.finished is not None
        assert times.finished >= deadline
        late = [at for at in harness.runner.began if at > deadline]
        assert len(late) <= 1  # the step that was planned when the time was up
        await harness.idle()


async def test_a_full_queue_refuses_at_once_and_says_when_to_retry() -> None:
    async with serving(max_batch_requests=1, max_waiting_requests=3) as harness:
        harness.runner.gate.clear()
        streams = [harness.engine.submit([make_request(max_tokens=2)])]
        await harness.until(lambda: harness.engine.load.num_running == 1)
        streams += [harness.engine.submit([make_request(max_tokens=2)]) for _ in range(3)]
        with pytest.raises(QueueFullError) as refused:
            harness.engine.submit([make_request()])
        assert refused.value.bound == "requests"
        assert 0.1 <= refused.value.retry_after <= 30
        assert harness.engine.load.num_waiting == 3
        harness.runner.gate.set()
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        assert all(r[-1].finish_reason is FinishReason.LENGTH for r in results)
        assert harness.engine.rejections == {"requests": 1, "tokens": 0, "bytes": 0}


async def test_a_burst_in_one_tick_admits_exactly_the_bound() -> None:
    async with serving(max_waiting_requests=5) as harness:
        harness.runner.gate.clear()
        harness.engine.submit([make_request()])
        await harness.until(lambda: harness.engine.load.num_running == 1)
        admitted = 0
        for _ in range(20):
            try:
                harness.engine.submit([make_request()])
            except QueueFullError:
                continue
            admitted += 1
        assert admitted == 5
        harness.runner.gate.set()


async def test_the_queue_is_bounded_in_tokens_and_takes_all_or_none() -> None:
    async with serving(max_batch_requests=1) as harness:
        harness.runner.gate.clear()
        harness.engine.submit([make_request()])
        await harness.until(lambda: harness.engine.load.num_running == 1)
        harness.engine.submit([make_request([11] * 200, 1)])
        with pytest.raises(QueueFullError, match="tokens"):
            harness.engine.submit([make_request([11] * 101, 1) for _ in range(2)])
        assert harness.engine.load.waiting_prompt_tokens == 200
        harness.engine.submit([make_request([11] * 200, 1)])
        harness.runner.gate.set()


async def test_the_queue_is_bounded_in_bytes() -> None:
    async with serving(max_batch_requests=1, max_waiting_bytes=100) as harness:
        harness.runner.gate.clear()
        harness.engine.submit([make_request(num_bytes=90)])
        await harness.until(lambda: harness.engine.load.num_running == 1)
        harness.engine.submit([make_request(num_bytes=60)])
        with pytest.raises(QueueFullError, match="bytes"):
            harness.engine.submit([make_request(num_bytes=41)])
        harness.engine.submit([make_request(num_bytes=40)])
        assert harness.engine.load.is_full(harness.engine.config)
        assert harness.engine.rejections == {"requests": 0, "tokens": 0, "bytes": 1}
        harness.runner.gate.set()


async def test_a_request_beyond_the_kv_cache_is_refused_at_once() -> None:
    async with serving(FakeRunner(num_blocks=4)) as harness:
        with pytest.raises(CapacityError):
            harness.engine.submit([make_request(max_tokens=14)])


async def test_memory_runs_out_and_everybody_still_gets_the_same_tokens() -> None:
    async with serving(FakeRunner(num_blocks=12), max_batch_tokens=64) as harness:
        prompts = [[20 + i] * 9 for i in range(6)]
        streams = [harness.engine.submit([make_request(prompt, 30)]) for prompt in prompts]
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        assert [tokens(r) for r in results] == [expected_tokens(prompt, 30) for prompt in prompts]
        await harness.idle()
        assert harness.engine.statistics.counters["preemptions"] > 0


async def test_a_failing_row_leaves_its_neighbours_alone() -> None:
    runner = FakeRunner()
    runner.fail_row = lambda row: ValueError("row") if 9 in row.token_ids else None
    async with serving(runner) as harness:
        good, bad = (harness.engine.submit([make_request([p, 5], 10)]) for p in (12, 9))
        good_outputs, bad_outputs = await asyncio.gather(collect(good), collect(bad))
        assert tokens(good_outputs) == expected_tokens([12, 5], 10)
        assert isinstance(bad_outputs[-1].error, ValueError)
        await harness.idle()
        harness.check_balance()


async def test_a_failed_step_ends_what_ran_and_serving_goes_on() -> None:
    async with serving(max_batch_requests=1) as harness:
        harness.runner.gate.clear()
        harness.runner.fail_step = RuntimeError("no such kernel")
        lost = harness.engine.submit([make_request(max_tokens=20)])
        waiting = harness.engine.submit([make_request(max_tokens=5)])
        harness.runner.gate.set()
        outputs = await collect(lost)
        assert isinstance(outputs[-1].error, EngineLostError)
        assert isinstance(outputs[-1].error.__cause__, RuntimeError)
        assert tokens(await collect(waiting)) == expected_tokens([11, 12, 13], 5)
        assert harness.listener.lost_with is None
        await harness.idle()
        harness.check_balance()


OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.mark.matrix("R55")
async def test_a_step_that_lacks_memory_is_retried_smaller_and_nobody_notices() -> None:
    async with serving(max_batch_tokens=64) as harness:
        harness.runner.gate.clear()
        harness.runner.fail_step = OutOfMemoryError("CUDA error: out of memory")
        prompts = [[20 + i] * 9 for i in range(4)]
        streams = [harness.engine.submit([make_request(prompt, 20)]) for prompt in prompts]
        harness.runner.gate.set()
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        assert [tokens(r) for r in results] == [expected_tokens(prompt, 20) for prompt in prompts]
        assert max(batch.num_tokens for batch in harness.runner.batches[1:]) <= 32
        await harness.idle()
        harness.check_balance()


async def test_one_token_for_which_there_is_no_memory_is_a_lost_step() -> None:
    async with serving(max_batch_tokens=1, max_batch_requests=1) as harness:
        harness.runner.fail_step = MemoryError()
        outputs = await collect(harness.engine.submit([make_request()]))
        assert isinstance(outputs[-1].error, EngineLostError)
        assert tokens(await collect(harness.engine.submit([make_request()])))
        assert harness.listener.lost_with is None


async def test_health_says_that_the_device_is_lost_before_any_stream_does() -> None:
    async with serving() as harness:
        ended_before: list[bool] = []
        stream = harness.engine.submit([make_request(max_tokens=200)])
        assert await stream.wait()
        harness.listener.lost = lambda error: ended_before.append(  # type: ignore[method-assign]
            not stream.is_live
        )
        harness.runner.fail_step = RuntimeError("CUDA error: an illegal memory access")
        assert isinstance((await collect(stream))[-1].error, EngineLostError)
        assert ended_before == [False]


async def test_a_lost_device_ends_everything_and_is_reported() -> None:
    async with serving(max_batch_requests=1) as harness:
        harness.runner.gate.clear()
        harness.runner.fail_step = RuntimeError("CUDA error: an illegal memory access")
        streams = [harness.engine.submit([make_request()]) for _ in range(3)]
        harness.runner.gate.set()
        for stream in streams:
            assert isinstance((await collect(stream))[-1].error, EngineLostError)
        await harness.until(lambda: harness.listener.lost_with is not None)
        with pytest.raises(EngineLostError):
            harness.engine.submit([make_request()])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("shape mismatch"), False),
        (OutOfMemoryError("CUDA error: out of memory"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_which_errors_mean_a_lost_device(error: Exception, expected: bool) -> None:
    assert is_device_error(error) is expected


async def test_a_reader_that_stalls_is_ended_and_others_are_not() -> None:
    patience = Patience(reader_seconds=0.5, buffered_tokens=8)
    async with serving(FakeRunner(step_seconds=0.006), patience) as harness:
        stalled = harness.engine.submit([make_request(max_tokens=250)])
        other = harness.engine.submit([make_request([77], 60)])
        assert tokens(await collect(other)) == expected_tokens([77], 60)
        await harness.idle()
        outputs = stalled.take()
        assert isinstance(outputs[-1].error, StalledReaderError)
        assert 8 < len(tokens(outputs)) < 250
        assert harness.engine.statistics.finished[FinishReason.ERROR] == 1


async def test_a_slow_reader_that_catches_up_is_left_alone() -> None:
    patience = Patience(reader_seconds=20.0, buffered_tokens=8)
    async with serving(FakeRunner(step_seconds=0.002), patience) as harness:
        stream = harness.engine.submit([make_request(max_tokens=150)])
        seen: list[RequestOutput] = []
        async for outputs in pieces(stream):
            seen += outputs
            await asyncio.sleep(0.05)
        assert seen[-1].finish_reason is FinishReason.LENGTH
        assert tokens(seen) == expected_tokens([11, 12, 13], 150)


async def test_the_watchdog_reports_a_hanging_step_and_its_recovery() -> None:
    async with serving(patience=Patience(step_seconds=0.5)) as harness:
        await asyncio.sleep(0.8)  # idle is not stalled
        assert harness.listener.stalls == []
        harness.runner.gate.clear()
        stream = harness.engine.submit([make_request()])
        await harness.until(lambda: harness.listener.stalls == [True])
        harness.runner.gate.set()
        assert tokens(await collect(stream)) == expected_tokens([11, 12, 13], 4)
        await harness.until(lambda: harness.listener.stalls == [True, False])


async def test_a_drain_finishes_what_was_admitted_and_refuses_the_rest() -> None:
    async with serving(FakeRunner(step_seconds=0.002)) as harness:
        streams = [harness.engine.submit([make_request([i], 20)]) for i in range(10, 16)]
        drain = asyncio.create_task(harness.engine.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            harness.engine.submit([make_request()])
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        await drain
        assert [tokens(r) for r in results] == [expected_tokens([i], 20) for i in range(10, 16)]


@pytest.mark.matrix("R66")
async def test_what_outlasts_the_drain_is_ended() -> None:
    async with serving(FakeRunner(step_seconds=0.01)) as harness:
        stream = harness.engine.submit([make_request(max_tokens=250)])
        await harness.engine.drain(0.05)
        outputs = await collect(stream)
        assert isinstance(outputs[-1].error, DrainingError)
        await harness.idle()


async def test_stopping_ends_open_streams() -> None:
    harness = Harness(FakeRunner(step_seconds=0.01), None)
    await harness.engine.start()
    stream = harness.engine.submit([make_request(max_tokens=250)])
    assert await stream.wait()
    await harness.engine.stop()
    assert isinstance((await collect(stream))[-1].error, DrainingError)


async def test_a_failed_load_is_raised_by_start() -> None:
    def load() -> FakeRunner:
        raise ValueError("no such file")

    engine = Engine(make_config(), load, make_statistics, FakeListener([]))
    with pytest.raises(NotReadyError):
        engine.submit([make_request()])
    with pytest.raises(ValueError, match="no such file"):
        await engine.start()
    await engine.stop()


async def test_a_bug_in_the_loop_is_fatal_and_nobody_hangs() -> None:
    async with serving() as harness:
        harness.runner.execute = lambda batch: []  # type: ignore[method-assign]
        outputs = await collect(harness.engine.submit([make_request()]))
        assert isinstance(outputs[-1].error, EngineLostError)
        await harness.until(lambda: isinstance(harness.listener.lost_with, ValueError))
