"""Steps planned before the last one's ids are known: the same outputs as one step at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from nanoinfer_engine.core.batch import Batch, RowResult, StepTiming
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.request import (
    FinishReason,
    Request,
    RequestOutput,
    TokenCounts,
)
from nanoinfer_engine.core.scheduler import Scheduler

from tests.engine.fakes import FakeRunner, expected_tokens, make_config, make_request


class LateStep:
    """A step whose results may be read; `AheadRunner` knows them all along, as a device does."""

    def __init__(self, results: list[RowResult]) -> None:
        self.row_results = results
        self.was_read = False

    def results(self) -> list[RowResult]:
        self.was_read = True
        return self.row_results

    def timing(self) -> StepTiming:
        return StepTiming("graph", 1e-3, 0.0)


class AheadRunner(FakeRunner):
    """Takes ids that the scheduler does not know from the step before."""

    runs_ahead = True

    def __init__(self, num_blocks: int = 64) -> None:
        super().__init__(num_blocks=num_blocks)
        self.steps: list[LateStep] = []
        self.num_ahead = 0

    def launch(self, batch: Batch) -> LateStep:
        rows = []
        for row in batch.rows:
            if row.source_row is not None:
                assert not self.steps[-1].was_read
                self.num_ahead += 1
                result = self.steps[-1].row_results[row.source_row]
                token_id = result[0].token_id if isinstance(result, tuple) else 0
                row = row._replace(token_ids=(*row.token_ids, token_id), source_row=None)
            rows.append(row)
        self.steps.append(LateStep(self.execute(Batch(tuple(rows)))))
        return self.steps[-1]


class Loop:
    def __init__(self, num_blocks: int = 64, **changes: object) -> None:
        self.runner = AheadRunner(num_blocks)
        config = make_config(max_waiting_requests=64, **changes)
        self.scheduler = Scheduler(config, Capacity(256, 4 * num_blocks))
        self.pipeline = Pipeline(self.runner)
        self.outputs: list[RequestOutput] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> None:
        step = self.pipeline.advance(self.scheduler.schedule())
        if step is not None:
            self.outputs += self.scheduler.update(step.batch, step.results)

    def run(self) -> None:
        for _ in range(5000):
            if not (self.scheduler.has_work or self.pipeline.is_busy):
                return
            self.step()
        raise AssertionError("does not end")


def test_decoding_goes_on_from_ids_that_nobody_has_read() -> None:
    loop = Loop()
    request = make_request([11, 12, 13], max_tokens=6)
    loop.add(request)
    loop.run()
    assert request.completion_token_ids == expected_tokens([11, 12, 13], 6)
    assert loop.runner.num_ahead == 5
    # the length is known beforehand: no step too many
    assert request.num_steps == 6
    # a step that decodes before the first token is read is no chunk of the prompt
    assert request.num_prefill_chunks == 1


def test_a_stop_id_costs_one_step_whose_token_nobody_sees() -> None:
    tokens = expected_tokens([11, 12, 13], 8)
    loop = Loop()
    request = make_request([11, 12, 13], max_tokens=8, stop=[tokens[3]])
    loop.add(request)
    loop.run()
    first = tokens.index(tokens[3])
    assert [t.token_id for o in loop.outputs for t in o.tokens] == tokens[:first]
    assert loop.outputs[-1].finish_reason is FinishReason.STOP
    assert loop.scheduler.load.kv_usage == 0


def test_rows_run_ahead_whatever_they_ask_for() -> None:
    loop = Loop()
    masked = make_request([11, 12, 13], max_tokens=6, min_tokens=4, stop=[5])
    scored = make_request([21, 22], max_tokens=6, num_logprobs=1)
    penalised = make_request([31, 32], max_tokens=6)
    penalised.sampling = replace(penalised.sampling, presence_penalty=1.0, num_prompt_logprobs=0)
    penalised.token_counts = TokenCounts(penalised.prompt_token_ids)
    loop.add(masked, scored, penalised)
    loop.run()
    assert loop.runner.num_ahead == 3 * 5
    assert scored.completion_token_ids == expected_tokens([21, 22], 6)
    assert penalised.completion_token_ids == expected_tokens([31, 32], 6)
    assert penalised.token_counts.num_counted == 6
    assert all(o.tokens[0].logprob for o in loop.outputs if o.request is scored)


def test_a_request_that_declines_waits_and_the_others_run_ahead() -> None:
    loop = Loop()
    ahead, waits = make_request([11, 12, 13], 12), make_request([21, 22], 6)
    waits.may_run_ahead = False
    loop.add(ahead, waits)
    loop.run()
    assert ahead.completion_token_ids == expected_tokens([11, 12, 13], 12)
    assert waits.completion_token_ids == expected_tokens([21, 22], 6)
    assert loop.runner.num_ahead == 11  # every decode of the one, none of the other
    with_two = [len(batch.rows) == 2 for batch in loop.runner.batches]
    assert with_two[:12] == [True, False] * 6  # every second step it knows its last id
    assert loop.scheduler.load.kv_usage == 0


def test_a_row_that_does_not_run_ahead_brings_all_its_ids() -> None:
    loop = Loop()
    request = make_request([21, 22], 5)
    request.may_run_ahead = False
    other = make_request([31, 32, 33], 5)
    loop.add(request, other)
    loop.run()
    rows = [row for batch in loop.runner.batches for row in batch.rows]
    own = [row for row in rows if row.request_number == request.number]
    wanted = [21, 22, *expected_tokens([21, 22], 5)]
    assert [list(row.known_token_ids) for row in own] == [wanted[:n] for n in range(2, 7)]
    assert not any(row.known_token_ids for row in rows if row.request_number == other.number)


def test_ids_are_held_back_until_the_unread_tokens_make_up_the_minimum() -> None:
    tokens = expected_tokens([11, 12, 13], 4)
    loop = Loop()
    # the third of these would be the stop id: it is held back for two tokens, unread ones included
    request = make_request([11, 12, 13], max_tokens=8, min_tokens=2, stop=[tokens[2]])
    loop.add(request)
    loop.run()
    masks = [
        row.masked_token_ids for batch in loop.runner.batches for row in batch.rows if row.samples
    ]
    assert [bool(mask) for mask in masks[:4]] == [True, True, False, False]
    assert request.completion_token_ids == tokens[:3]


def test_a_cancelled_request_gives_its_blocks_back_with_a_step_in_flight() -> None:
    loop = Loop()
    first, second = make_request(max_tokens=50), make_request([31, 32], max_tokens=12)
    loop.add(first, second)
    for _ in range(4):
        loop.step()
    assert loop.pipeline.is_busy
    loop.scheduler.cancel(first)
    seen = len(first.completion_token_ids)
    loop.run()
    assert len(first.completion_token_ids) == seen
    assert second.completion_token_ids == expected_tokens([31, 32], 12)
    assert loop.scheduler.load.kv_usage == 0


def test_a_row_that_fails_ends_alone() -> None:
    loop = Loop()
    bad, good = make_request([41, 42], max_tokens=9), make_request([51, 52], max_tokens=9)
    loop.runner.fail_row = lambda row: (
        ValueError("no") if row.context_length == 4 and 41 in loop_prompt(loop, row) else None
    )
    loop.add(bad, good)
    loop.run()
    assert good.completion_token_ids == expected_tokens([51, 52], 9)
    failed = [o for o in loop.outputs if o.error is not None]
    assert [o.request for o in failed] == [bad]


def loop_prompt(loop: Loop, row: object) -> list[int]:
    return [loop.runner._memory[loop.runner._slot(row, i)] for i in range(2)]  # type: ignore[arg-type]


def test_a_lost_step_loses_the_one_in_flight_too() -> None:
    loop = Loop()
    loop.add(make_request(max_tokens=20))
    for _ in range(3):
        loop.step()
    loop.runner.fail_step = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="memory"):
        loop.step()
    assert loop.scheduler.retry_smaller()
    loop.run()
    (request,) = {o.request for o in loop.outputs}
    assert request.completion_token_ids == expected_tokens([11, 12, 13], 20)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_random_loads_under_memory_pressure(seed: int, prefix_caching: bool) -> None:
    """Preemption, priorities, cancels, chunked prompts that begin alike: each as if alone."""
    source = random.Random(seed)
    loop = Loop(num_blocks=16, prefix_caching=prefix_caching)
    requests, cancelled = [], set()
    common = [source.randrange(10, 99) for _ in range(9)]
    for _ in range(14):
        prompt = common[: source.choice((0, 8, 9))] + [
            source.randrange(10, 99) for _ in range(source.randint(1, 14))
        ]
        request = make_request(
            prompt, max_tokens=source.randint(1, 20), priority=source.choice((0, 0, 1))
        )
        requests.append(request)
        loop.add(request)
        for _ in range(source.randint(0, 6)):
            loop.step()
        if source.random() < 0.15:
            victim = source.choice(requests)
            if loop.scheduler.cancel(victim) is not None:
                cancelled.add(victim)
    loop.run()
    for request in requests:
        if request in cancelled:
            continue
        wanted = expected_tokens(list(request.prompt_token_ids), request.stopping.max_tokens)
        given = request.completion_token_ids
        assert given == wanted[: len(given)]
        ended = [o for o in loop.outputs if o.request is request and o.finish_reason]
        assert len(ended) == 1
        if ended[0].finish_reason is FinishReason.LENGTH:
            assert given == wanted
    assert loop.scheduler.load.kv_usage == 0
    assert loop.runner.num_ahead > 0


def test_a_step_may_be_lost_at_any_moment_under_preemption() -> None:
    """At some moments a request has just been preempted while a token of it is in flight."""
    num_unread_while_waiting = 0
    for moment in range(1, 60):
        loop = Loop(num_blocks=12)
        requests = [make_request([11 + i] * 8, max_tokens=30) for i in range(2)]
        loop.add(*requests)
        for _ in range(moment):
            loop.step()
        batch = loop.scheduler.schedule()
        if batch is None:
            break
        waiting = [request for request in requests if request in loop.scheduler._waiting]
        num_unread_while_waiting += sum(request.num_unread_tokens for request in waiting)
        loop.runner.fail_step = MemoryError("no room for this step")
        with pytest.raises(MemoryError):
            loop.pipeline.advance(batch)
        assert loop.scheduler.retry_smaller()
        loop.run()
        for request in requests:
            wanted = expected_tokens(list(request.prompt_token_ids), 30)
            assert request.completion_token_ids == wanted, moment
        assert loop.scheduler.load.kv_usage == 0
    assert num_unread_while_waiting > 0
