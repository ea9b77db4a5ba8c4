"""The scheduler's state machine with a step in flight: preemption, cancels, deadlines, lost steps.

Whatever is lost while another step is in flight: no request hangs, every token is the one it would
get alone, and nothing that a lost step was to give is counted on afterwards.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from nanoinfer_engine.core.errors import EngineLostError
from nanoinfer_engine.core.pipeline import Pipeline

from tests.engine.control.test_running_ahead import AheadRunner
from tests.engine.control.test_scheduler_machine import SchedulerMachine
from tests.engine.fakes import FakeRunner


class RunningAheadMachine(SchedulerMachine):
    @initialize(
        num_blocks=st.integers(4, 12),
        max_batch_tokens=st.integers(4, 24),
        max_batch_requests=st.integers(1, 4),
        prefix_caching=st.booleans(),
    )
    def start(
        self, num_blocks: int, max_batch_tokens: int, max_batch_requests: int, prefix_caching: bool
    ) -> None:
        super().start(num_blocks, max_batch_tokens, max_batch_requests, prefix_caching)
        self.pipeline = Pipeline(self.runner)

    def make_runner(self, num_blocks: int) -> FakeRunner:
        return AheadRunner(num_blocks)

    def may_run_ahead(self) -> bool:
        """Every third request declines."""
        return self.num_added % 3 > 0

    @rule()
    def step(self) -> None:
        self.clock.now += 1
        self.take(self.scheduler.expire())
        ended = self.pipeline.advance(self.scheduler.schedule())
        if ended is not None:
            self.take(self.scheduler.update(ended.batch, ended.results))

    @precondition(lambda self: self.live)
    @rule()
    def lose_a_step(self) -> None:
        if self.fail_launch():
            self.take(self.scheduler.fail_running(EngineLostError()))
            assert self.scheduler.load.num_running == 0

    @precondition(lambda self: self.live)
    @rule()
    def lack_memory_for_a_step(self) -> None:
        if not self.fail_launch():
            return
        if not self.scheduler.retry_smaller():
            self.take(self.scheduler.fail_running(EngineLostError()))
        assert self.scheduler.load.num_running == 0
        assert self.scheduler.load.kv_usage == 0

    def cancel_within_a_step(self) -> None:
        """`cancel` is one here: a step is in flight nearly always."""

    def fail_launch(self) -> bool:
        """Plan a step and lose it with the one in flight; False where there was none to plan."""
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        self.runner.fail_step = EngineLostError()
        try:
            self.pipeline.advance(batch)
        except EngineLostError:
            return True
        raise AssertionError("the launch was to fail")

    @invariant()
    def what_is_in_flight_adds_up(self) -> None:
        steps = self.scheduler._in_flight._steps
        assert len(steps) == self.pipeline.is_busy
        for request in self.live:
            granted = [step[request] for step in steps if request in step]
            assert request.num_in_flight_tokens == sum(granted)
            assert 0 <= request.num_unread_tokens <= len(granted)
            if not granted:
                assert request.num_unread_tokens == 0
            if not request.may_run_ahead and request.num_unread_tokens:
                assert request.num_unread_tokens == 1
                assert request.num_pending_tokens == 1  # the unread id: granted to no step


RunningAheadMachine.TestCase.settings = SchedulerMachine.TestCase.settings
TestRunningAheadMachine = RunningAheadMachine.TestCase
