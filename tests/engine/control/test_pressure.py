"""An engine that is short of blocks behind a full queue, and one whose figures are read often."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import pytest
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_engine.core.batch import Batch, RowResult
from nanoinfer_engine.core.errors import QueueFullError

from tests.engine.control.conftest import Engine, StartFake
from tests.engine.control.test_engine import collect, serving, tokens
from tests.engine.control.test_metrics import scrape
from tests.engine.fakes import FakeRunner, expected_tokens, make_request

SEED = pb.SamplingParams(seed=0)


class Held(FakeRunner):
    """Stops within the first step for which `hold` is true, until `go_on`."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.hold: Callable[[Batch], bool] = lambda batch: False
        self.is_held = threading.Event()

    def execute(self, batch: Batch) -> list[RowResult]:
        if self.hold(batch):
            self.gate.clear()
            self.is_held.set()
        return super().execute(batch)

    async def until_held(self) -> None:
        assert await asyncio.to_thread(self.is_held.wait, 60)

    def go_on(self, hold: Callable[[Batch], bool]) -> None:
        self.hold = hold
        self.is_held.clear()
        self.gate.set()


@pytest.mark.matrix("R51", "R52")
async def test_what_is_preempted_waits_though_the_queue_is_full() -> None:
    runner = Held(num_blocks=16)  # 64 tokens, and each request becomes 48
    async with serving(runner, max_batch_requests=4, max_waiting_requests=4) as harness:
        engine = harness.engine
        prompts = [[20 + i] * 8 for i in range(8)]
        runner.hold = lambda batch: len(batch.rows) == 4
        streams = [engine.submit([make_request(prompt, 40)]) for prompt in prompts[:4]]
        await runner.until_held()
        streams += [engine.submit([make_request(prompt, 40)]) for prompt in prompts[4:]]
        assert engine.load.num_waiting == 4
        runner.go_on(lambda batch: engine.load.num_waiting > 4)
        await runner.until_held()
        assert engine.load.num_waiting > 4
        with pytest.raises(QueueFullError):
            engine.submit([make_request()])
        runner.go_on(lambda batch: False)
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        assert [tokens(r) for r in results] == [expected_tokens(p, 40) for p in prompts]
        await harness.idle()
        assert engine.statistics.counters["preemptions"] > 0
        harness.check_balance()


class Timed(FakeRunner):
    """Notes what the engine's thread has used of a CPU at each step."""

    def __init__(self) -> None:
        super().__init__(num_blocks=256, step_seconds=0.004)
        self.cpu: list[int] = []

    def execute(self, batch: Batch) -> list[RowResult]:
        self.cpu.append(time.thread_time_ns())
        return super().execute(batch)


@pytest.mark.matrix("R73")
async def test_readers_of_metrics_cost_the_steps_nothing(start_fake: StartFake) -> None:
    """A step takes 4 ms, and every fifth is followed by a scrape: 50 a second."""
    runner, num_tokens = Timed(), 120
    stopping = pb.StoppingParams(max_tokens=num_tokens, ignore_eos=True)

    async def served() -> list[int]:
        """CPU time between one step and the next; the tokens are checked."""
        first = len(runner.cpu)
        prompts = [[20 + i] for i in range(4)]
        calls = [engine.generate(p, sampling=SEED, stopping=stopping) for p in prompts]
        for prompt, answer in zip(prompts, await asyncio.gather(*calls), strict=True):
            assert answer.tokens() == expected_tokens(prompt, num_tokens)
        return [after - before for before, after in pairwise(runner.cpu[first:])]

    async with start_fake(runner, metrics_port=0, max_batch_requests=4) as engine:
        alone, read = [], []
        scrapes: list[float] = []
        for _ in range(3):  # in turn, so that both see the same machine
            alone += await served()
            reading = asyncio.create_task(read_every_fifth_step(engine, runner, scrapes))
            read += await served()
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
    assert len(scrapes) > 3 * num_tokens // 10
    assert scrapes == sorted(scrapes)
    assert statistics.median(read) < 1.5 * statistics.median(alone)


async def read_every_fifth_step(engine: Engine, runner: Timed, scrapes: list[float]) -> None:
    """Each scrape tells of every step that ended before it."""
    while True:
        due = len(runner.batches) + 5
        while len(runner.batches) < due:
            await asyncio.sleep(0.001)
        _, values = await scrape(engine)
        scrapes.append(values["nanoinfer_engine_step_seconds_count:eager"])
        assert scrapes[-1] >= due - 2  # one is under way, and one may be about to be told
