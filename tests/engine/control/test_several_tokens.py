"""Rows that give several tokens in one step: completions, ends and counts as one by one."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from nanoinfer_engine.core.batch import BatchRow, RowResult
from nanoinfer_engine.core.errors import RowError
from nanoinfer_engine.core.request import FinishReason, Request, RequestOutput, SampledToken
from nanoinfer_engine.server.metrics import make_statistics

from tests.engine.control.bench import Bench
from tests.engine.control.test_running_ahead import AheadRunner, Loop
from tests.engine.control.test_running_ahead_machine import RunningAheadMachine
from tests.engine.control.test_scheduler_machine import BLOCK_SIZE, SchedulerMachine
from tests.engine.fakes import FakeRunner, expected_tokens, make_request, next_token


def several(runner: FakeRunner, row: BatchRow, num_tokens: int) -> RowResult:
    """The next tokens after the row, as so many steps would give them one by one."""
    first = FakeRunner._sample(runner, row)
    if not isinstance(first, tuple) or not first:
        return first
    context = [runner._memory[runner._slot(row, i)] for i in range(row.context_length)]
    tokens = list(first)
    while len(tokens) < num_tokens:
        ids = [*context, *(token.token_id for token in tokens)]
        tokens.append(SampledToken(next_token(ids, row.sampling.seed, row.masked_token_ids)))
    return tuple(tokens)


class SeveralRunner(FakeRunner):
    """Gives `num_tokens` tokens for every row that samples."""

    num_tokens = 2

    def _sample(self, row: BatchRow) -> RowResult:
        return several(self, row, self.num_tokens)


class SeveralAheadRunner(AheadRunner):
    """The same for a runner that runs ahead; which rows give several depends on the context."""

    def _sample(self, row: BatchRow) -> RowResult:
        return several(self, row, 1 + row.context_length % 3)


def make_bench(num_tokens: int = 2, num_blocks: int = 64, **changes: object) -> Bench:
    bench = Bench(num_blocks, **changes)
    bench.runner = SeveralRunner(num_blocks, max_model_len=256)
    bench.runner.num_tokens = num_tokens
    return bench


def ids(outputs: list[RequestOutput], request: Request) -> list[int]:
    return [t.token_id for o in outputs if o.request is request for t in o.tokens]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 12])
def test_all_tokens_of_a_step_are_taken_up_to_the_length(num_tokens: int, max_tokens: int) -> None:
    bench = make_bench(num_tokens)
    request = make_request([11, 12, 13], max_tokens)
    bench.add(request)
    outputs = bench.run()
    assert ids(outputs, request) == expected_tokens([11, 12, 13], max_tokens)
    assert request.completion_token_ids == expected_tokens([11, 12, 13], max_tokens)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert len(outputs) == request.num_steps == -(-max_tokens // num_tokens)
    assert bench.scheduler.load.kv_usage == 0


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("include_stop", [True, False])
def test_what_follows_a_stop_id_within_a_step_is_dropped(place: int, include_stop: bool) -> None:
    tokens = expected_tokens([11, 12, 13], 8)
    bench = make_bench(3)
    request = make_request([11, 12, 13], 8, stop=[tokens[place]], include_stop=include_stop)
    bench.add(request)
    outputs = bench.run()
    assert ids(outputs, request) == tokens[: place + include_stop]
    assert request.completion_token_ids == tokens[: place + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_token_id == tokens[place]
    assert sum(output.num_tokens for output in outputs) == place + 1


def test_decoding_several_tokens_comes_before_prompts_and_finds_blocks() -> None:
    bench = make_bench(3, max_batch_tokens=16)
    first = make_request([11, 12, 13, 14], 30)
    bench.add(first)
    bench.step()
    bench.add(make_request(range(20, 50), 2))
    bench.step()
    assert bench.grants() == [3, 13]  # the ids that are known and not computed, then the prompt
    outputs = bench.run()
    assert first.completion_token_ids == expected_tokens([11, 12, 13, 14], 30)
    assert first.num_prefill_chunks == 1
    assert not any(output.error for output in outputs)


def test_preemption_with_several_tokens_a_step_changes_nothing() -> None:
    source = random.Random(3)
    bench = make_bench(3, num_blocks=14)
    requests = [
        make_request([source.randrange(10, 99) for _ in range(8)], source.randint(8, 24))
        for _ in range(8)
    ]
    bench.add(*requests)
    outputs = bench.run()
    assert bench.scheduler.num_preemptions > 0
    for request in requests:
        wanted = expected_tokens(request.prompt_token_ids, request.stopping.max_tokens)
        assert ids(outputs, request) == wanted
    assert bench.scheduler.load.kv_usage == 0


def test_tokens_are_counted_one_by_one() -> None:
    bench = make_bench(3)
    statistics = make_statistics(256)
    request = make_request([11, 12, 13], 7)
    bench.add(request)
    while bench.scheduler.has_work:
        bench.clock.advance(6)
        statistics.record_outputs(bench.step())
    snapshot = statistics.snapshot(0)
    assert snapshot.counters["completion_tokens"] == 7
    gaps = snapshot.histograms["inter_token"]
    # two came with the first one, three 6 s later, and the last one 6 s after those
    assert sum(gaps.counts) == 6
    assert gaps.total == pytest.approx(3 * 2 + 6)
    assert snapshot.histograms["time_to_first_token"].counts.count(1) == 1


def test_a_tenant_is_charged_for_every_token() -> None:
    bench = make_bench(3)
    request = make_request([11, 12, 13], 7, tenant="a")
    other = make_request([21, 22, 23], 7, tenant="b")
    bench.add(request, other)
    bench.step()
    served = bench.scheduler._waiting._served
    assert served[request.line] == served[other.line] == 3 + 3


@pytest.mark.parametrize("result", [(), (SampledToken(11),)])
def test_a_row_that_gives_what_it_cannot_ends_alone(result: RowResult) -> None:
    bench = Bench()
    bad, good = make_request([11] * 20, 3), make_request([21] * 2, 6)
    bench.add(good)
    bench.step()
    bench.add(bad)
    batch = bench.scheduler.schedule()
    assert batch is not None
    results = bench.runner.execute(batch)
    (index,) = [i for i, row in enumerate(batch.rows) if row.token_ids[:1] == (11,)]
    assert not batch.rows[index].samples
    results[index] = (SampledToken(11),)
    if result == ():
        results[index], results[1 - index] = (), ()
        bad, good = good, bad
    ended = [o for o in bench.scheduler.update(batch, results) if o.finish_reason]
    assert [(o.request, type(o.error)) for o in ended] == [(bad, RowError)]
    bench.run()
    wanted = expected_tokens(good.prompt_token_ids, good.stopping.max_tokens)
    assert good.completion_token_ids == wanted


def test_several_tokens_of_a_request_that_ran_ahead_end_it_alone() -> None:
    loop = Loop()
    loop.runner = SeveralAheadRunner()
    loop.pipeline._runner = loop.runner
    ahead, waits = make_request([11, 12, 13], 9), make_request([21, 22, 23], 9)
    waits.may_run_ahead = False
    loop.add(ahead, waits)
    loop.run()
    assert [o.request for o in loop.outputs if isinstance(o.error, RowError)] == [ahead]
    assert waits.completion_token_ids == expected_tokens([21, 22, 23], 9)
    assert waits.num_in_flight_tokens == waits.num_unread_tokens == 0
    assert loop.scheduler.load.kv_usage == 0


class SeveralMachine(SchedulerMachine):
    """Everything that can happen to the scheduler, with two tokens a step."""

    def make_runner(self, num_blocks: int) -> FakeRunner:
        return SeveralRunner(num_blocks, BLOCK_SIZE)


class SeveralAheadMachine(RunningAheadMachine):
    """The same with a step in flight, for requests that do not run ahead."""

    def make_runner(self, num_blocks: int) -> FakeRunner:
        return SeveralAheadRunner(num_blocks)

    def may_run_ahead(self) -> bool:
        return False


SeveralMachine.TestCase.settings = settings(SchedulerMachine.TestCase.settings, max_examples=30)
SeveralAheadMachine.TestCase.settings = SeveralMachine.TestCase.settings
TestSeveralMachine = SeveralMachine.TestCase
TestSeveralAheadMachine = SeveralAheadMachine.TestCase
