"""A scheduler and a fake runner, stepped by hand."""

from __future__ import annotations

from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.request import Request, RequestOutput
from nanoinfer_engine.core.scheduler import Scheduler

from tests.engine.fakes import FakeClock, FakeRunner, make_config


class Bench:
    """What a test of policy drives: `add`, `step`, `run`."""

    def __init__(self, num_blocks: int = 64, max_model_len: int = 256, **changes: object) -> None:
        self.clock = FakeClock()
        self.runner = FakeRunner(num_blocks, max_model_len=max_model_len)
        capacity = Capacity(max_model_len, num_blocks * self.runner.block_size)
        self.scheduler = Scheduler(make_config(**changes), capacity, self.clock)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> list[RequestOutput]:
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        return self.scheduler.update(batch, self.runner.execute(batch))

    def run(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return outputs
            outputs += self.step()
        raise AssertionError("requests do not end")

    def grants(self) -> list[int]:
        return [row.num_tokens for row in self.runner.batches[-1].rows]
