"""A hypothesis state machine over scheduler, block pool and a fake runner with a paged memory.

Whatever the order of arrivals, steps, cancels, deadlines and failures: no block is lost, owned
twice or freed twice; every admitted request ends; a cancelled one gives all its blocks back at
once; and every token is the one the request would get alone, preempted or not.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from nanoinfer_engine.capacity import Capacity
from nanoinfer_engine.errors import EngineLostError
from nanoinfer_engine.request import FinishReason, Request, RequestOutput
from nanoinfer_engine.scheduler import Scheduler

from tests.engine.fakes import FakeClock, FakeRunner, expected_tokens, make_config, make_request

BLOCK_SIZE = 4


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 12),
        max_batch_tokens=st.integers(4, 24),
        max_batch_requests=st.integers(1, 4),
    )
    def start(self, num_blocks: int, max_batch_tokens: int, max_batch_requests: int) -> None:
        self.clock = FakeClock()
        self.runner = FakeRunner(num_blocks, BLOCK_SIZE)
        self.capacity = Capacity(256, num_blocks * BLOCK_SIZE)
        config = make_config(
            max_batch_tokens=max_batch_tokens, max_batch_requests=max_batch_requests
        )
        self.scheduler = Scheduler(config, self.capacity, self.clock)
        self.live: dict[Request, list[int]] = {}
        self.num_added = 0
        self.num_ended = 0

    @rule(
        prompt_length=st.integers(1, 30),
        max_tokens=st.integers(1, 30),
        priority=st.integers(-1, 1),
        deadline=st.none() | st.integers(1, 20),
    )
    def add(self, prompt_length: int, max_tokens: int, priority: int, deadline: int | None) -> None:
        prompt_length = min(prompt_length, self.capacity.kv_tokens - 1)
        self.num_added += 1
        request = make_request(
            [10 + (self.num_added * 31 + i) % 900 for i in range(prompt_length)],
            min(max_tokens, self.capacity.kv_tokens - prompt_length),
            priority=priority,
            deadline=None if deadline is None else self.clock.now + deadline,
            seed=self.num_added,
        )
        self.scheduler.add(request)
        self.live[request] = []

    @rule()
    def step(self) -> None:
        self.clock.now += 1
        self.take(self.scheduler.expire())
        batch = self.scheduler.schedule()
        assert (batch is None) == (not self.live)
        if batch is not None:
            self.take(self.scheduler.update(batch, self.runner.execute(batch)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.live)))
        usage = self.scheduler.load.kv_usage
        held = len(request.block_ids)
        output = self.scheduler.cancel(request)
        assert output is not None
        self.take([output])
        freed = (usage - self.scheduler.load.kv_usage) * self.runner.num_blocks
        assert round(freed) == held

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel_within_a_step(self, data: st.DataObject) -> None:
        batch = self.scheduler.schedule()
        assert batch is not None
        results = self.runner.execute(batch)
        request = data.draw(st.sampled_from(list(self.live)))
        output = self.scheduler.cancel(request)
        assert output is not None
        self.take([output])
        self.take(self.scheduler.update(batch, results))

    @precondition(lambda self: self.live)
    @rule()
    def fail_a_row(self) -> None:
        self.runner.fail_row = lambda row: ValueError() if row.start % 3 == 0 else None
        self.step()
        self.runner.fail_row = lambda row: None

    @precondition(lambda self: self.live)
    @rule()
    def lose_a_step(self) -> None:
        assert self.scheduler.schedule() is not None
        self.take(self.scheduler.fail_running(EngineLostError()))

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            tokens = self.live[output.request]  # a request that has ended gives nothing more
            tokens += [token.token_id for token in output.tokens]
            if output.finish_reason is None:
                continue
            request = output.request
            del self.live[request]
            self.num_ended += 1
            assert request.block_ids == []
            prompt, seed = request.prompt_token_ids, request.sampling.seed
            assert tokens == expected_tokens(prompt, len(tokens), seed)
            if output.finish_reason is FinishReason.LENGTH:
                assert len(tokens) == request.stopping.max_tokens

    @invariant()
    def books_balance(self) -> None:
        owned = [block for request in self.live for block in request.block_ids]
        assert len(owned) == len(set(owned))
        load = self.scheduler.load
        assert round(load.kv_usage * self.runner.num_blocks) == len(owned)
        assert load.num_running + load.num_waiting == len(self.live)
        assert self.num_added == self.num_ended + len(self.live)
        for request in self.live:
            assert 0 <= request.num_computed_tokens <= request.num_tokens

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5_000):
            if not self.live:
                break
            self.step()
        assert not self.live, "admitted requests do not end"
        assert self.scheduler.load.kv_usage == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSchedulerMachine = SchedulerMachine.TestCase
