"""A hypothesis state machine over scheduler, block pool and a fake runner with a paged memory.

Whatever the order of arrivals, steps, cancels, deadlines and failures, with shared prefixes or
none: no block is lost, written by two or freed twice; what the prefix cache would give away is what
its name says; every admitted request ends; a cancelled one gives all its blocks back at once; and
every token is the one the request would get alone, preempted or not, cached or not.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.errors import EngineLostError
from nanoinfer_engine.core.request import FinishReason, Request, RequestOutput
from nanoinfer_engine.core.scheduler import Scheduler

from tests.engine.fakes import FakeClock, FakeRunner, expected_tokens, make_config, make_request

BLOCK_SIZE = 4


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 12),
        max_batch_tokens=st.integers(4, 24),
        max_batch_requests=st.integers(1, 4),
        prefix_caching=st.booleans(),
    )
    def start(
        self, num_blocks: int, max_batch_tokens: int, max_batch_requests: int, prefix_caching: bool
    ) -> None:
        self.clock = FakeClock()
        self.runner = self.make_runner(num_blocks)
        self.capacity = Capacity(256, num_blocks * BLOCK_SIZE)
        config = make_config(
            max_batch_tokens=max_batch_tokens,
            max_batch_requests=max_batch_requests,
            prefix_caching=prefix_caching,
        )
        self.scheduler = Scheduler(config, self.capacity, self.clock)
        self.live: dict[Request, list[int]] = {}
        self.num_added = 0
        self.num_ended = 0
        self.contents: dict[bytes, tuple[int, ...]] = {}  # what every name must stand for

    def make_runner(self, num_blocks: int) -> FakeRunner:
        return FakeRunner(num_blocks, BLOCK_SIZE)

    def may_run_ahead(self) -> bool:
        """Whether the request that is added next may."""
        return True

    @rule(
        prompt_length=st.integers(1, 30),
        common_length=st.integers(0, 30),
        max_tokens=st.integers(1, 30),
        priority=st.integers(-1, 1),
        deadline=st.none() | st.integers(1, 20),
        tenant=st.sampled_from(["", "a", "b"]),
        seed=st.integers(0, 1),
    )
    def add(
        self,
        prompt_length: int,
        common_length: int,
        max_tokens: int,
        priority: int,
        deadline: int | None,
        tenant: str,
        seed: int,
    ) -> None:
        prompt_length = min(prompt_length, self.capacity.kv_tokens - 1)
        self.num_added += 1
        common = range(10, 10 + min(common_length, prompt_length))
        own = [100 + (self.num_added * 31 + i) % 900 for i in range(prompt_length - len(common))]
        request = make_request(
            [*common, *own],
            min(max_tokens, self.capacity.kv_tokens - prompt_length),
            priority=priority,
            deadline=None if deadline is None else self.clock.now + deadline,
            seed=seed,
            tenant=tenant,
        )
        request.may_run_ahead = self.may_run_ahead()
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
        others = {b for other in self.live if other is not request for b in other.block_ids}
        held = len(set(request.block_ids) - others)
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

    @precondition(lambda self: self.live)
    @rule()
    def lack_memory_for_a_step(self) -> None:
        assert self.scheduler.schedule() is not None
        if not self.scheduler.retry_smaller():
            self.take(self.scheduler.fail_running(EngineLostError()))
        assert self.scheduler.load.num_running == 0
        assert self.scheduler.load.kv_usage == 0

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            tokens = self.live[output.request]  # a request that has ended gives nothing more
            tokens += [token.token_id for token in output.tokens]
            if output.finish_reason is None:
                continue
            request = output.request
            del self.live[request]
            self.num_ended += 1
            assert not request.block_ids
            prompt, seed = request.prompt_token_ids, request.sampling.seed
            assert tokens == expected_tokens(prompt, len(tokens), seed)
            if output.finish_reason is FinishReason.LENGTH:
                assert len(tokens) == request.stopping.max_tokens

    @invariant()
    def books_balance(self) -> None:
        held = [block for request in self.live for block in request.block_ids]
        pool = self.scheduler._tables._pool
        for block in set(held):
            assert pool._num_users[block] == held.count(block)
        unused = [*pool._free, *pool._kept]
        assert sorted(set(held) | set(unused)) == list(range(self.runner.num_blocks))
        assert len(set(held)) + len(unused) == self.runner.num_blocks
        assert set(pool._kept) <= set(pool._names)
        for request in self.live:  # what may still be written has one owner
            full = request.num_granted_tokens // BLOCK_SIZE
            assert all(held.count(block) == 1 for block in request.block_ids[full:])
        load = self.scheduler.load
        assert round(load.kv_usage * self.runner.num_blocks) == len(set(held))
        assert load.num_running + load.num_waiting == len(self.live)
        assert self.num_added == self.num_ended + len(self.live)
        for request in self.live:
            assert 0 <= request.num_computed_tokens <= request.num_tokens

    @invariant()
    def cached_content_is_what_its_name_says(self) -> None:
        for request in self.live:
            for index, name in enumerate(request.block_names):
                tokens = request.tokens(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                assert self.contents.setdefault(name, tokens) == tokens
        pool = self.scheduler._tables._pool
        assert {block: name for name, block in pool._by_name.items()} == pool._names
        for name, block in pool._by_name.items():
            slots = range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            # a request that came and went between two checks left no record of its names
            content = tuple(self.runner._memory[slot] for slot in slots)
            assert self.contents.get(name, content) == content

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
