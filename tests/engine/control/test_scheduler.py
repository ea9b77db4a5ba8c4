"""The scheduler's policy, one rule a test; the fake runner stands in for the model."""

from __future__ import annotations

import pytest
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.errors import CapacityError, QueueTimeoutError
from nanoinfer_engine.core.request import FinishReason, RequestOutput, SampledToken

from tests.engine.control.bench import Bench
from tests.engine.fakes import EOS, expected_tokens, make_request


def reasons(outputs: list[RequestOutput]) -> list[FinishReason]:
    return [output.finish_reason for output in outputs if output.finish_reason]


def test_one_request_runs_to_its_length() -> None:
    bench = Bench()
    request = make_request([11, 12, 13], max_tokens=5)
    bench.add(request)
    outputs = bench.run()
    assert request.completion_token_ids == expected_tokens([11, 12, 13], 5)
    assert [o.tokens[0].token_id for o in outputs] == request.completion_token_ids
    assert reasons(outputs) == [FinishReason.LENGTH]
    assert bench.scheduler.load.kv_usage == 0
    # one prefill, then one token a step
    assert [batch.num_tokens for batch in bench.runner.batches] == [3, 1, 1, 1, 1]
    assert request.num_steps == 5
    assert request.num_prefill_chunks == 1


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_once() -> None:
    bench = Bench()
    request = make_request(range(10, 50), max_tokens=1)
    bench.add(request)
    bench.run()
    assert [batch.num_tokens for batch in bench.runner.batches] == [16, 16, 8]
    assert [batch.rows[0].samples for batch in bench.runner.batches] == [False, False, True]
    assert request.num_prefill_chunks == 3
    assert request.completion_token_ids == expected_tokens(range(10, 50), 1)


def test_decodes_come_first_and_a_prefill_gets_what_remains() -> None:
    bench = Bench()
    bench.add(make_request(max_tokens=50), make_request(max_tokens=50))
    bench.step()
    bench.add(make_request(range(10, 50)))
    bench.step()
    assert bench.grants() == [1, 1, 14]


def test_a_step_keeps_to_its_bounds() -> None:
    bench = Bench()
    bench.add(*(make_request(range(10, 16), max_tokens=30) for _ in range(8)))
    while bench.scheduler.has_work:
        bench.step()
        batch = bench.runner.batches[-1]
        assert batch.num_tokens <= 16
        assert len(batch.rows) <= 4


def test_priority_then_arrival_decides_who_starts() -> None:
    bench = Bench(max_batch_requests=1)
    low, first, second, high = (make_request(priority=p) for p in (-5, 0, 0, 7))
    bench.add(low, first, second, high)
    outputs = bench.run()
    ended = [output.request for output in outputs if output.finish_reason]
    assert ended == [high, first, second, low]


def test_the_lowest_priority_and_newest_is_preempted_first() -> None:
    # 8 blocks; three prompts of 2 blocks each grow to 5 blocks each
    bench = Bench(num_blocks=8, max_batch_tokens=64)
    older, newer = make_request(range(20, 25), 12), make_request(range(30, 35), 12)
    urgent = make_request(range(10, 15), 12, priority=1)
    bench.add(older, newer)
    bench.step()
    bench.add(urgent)  # the newest of all
    bench.step()
    assert bench.scheduler.load.num_running == 3
    while not (older.num_preemptions or newer.num_preemptions or urgent.num_preemptions):
        bench.step()
    assert (newer.num_preemptions, older.num_preemptions) == (1, 0)
    bench.run()
    assert urgent.num_preemptions == 0
    for request in (older, newer, urgent):
        assert request.completion_token_ids == expected_tokens(request.prompt_token_ids, 12)


def test_a_preempted_request_goes_on_with_the_same_tokens() -> None:
    # 5 blocks = 20 tokens, and two requests that grow to 17 tokens each
    bench = Bench(num_blocks=5, max_batch_tokens=64)
    older, newer = make_request(range(10, 15), 12), make_request(range(20, 25), 12)
    bench.add(older, newer)
    outputs = bench.run()
    assert older.num_preemptions == 0
    assert newer.num_preemptions > 0
    assert [name for name, _ in newer.events][:2] == ["preempted", "resumed"]
    for request in (older, newer):
        assert request.completion_token_ids == expected_tokens(request.prompt_token_ids, 12)
    seen = [o.tokens[0].token_id for o in outputs if o.request is newer]
    assert seen == newer.completion_token_ids  # nothing is sent twice
    assert bench.scheduler.load.kv_usage == 0
    assert bench.scheduler.num_preemptions == newer.num_preemptions


@pytest.mark.matrix("R52")
def test_a_preempted_request_waits_at_the_head_of_its_class() -> None:
    bench = Bench(num_blocks=5, max_batch_tokens=64)
    older, newer, last = (make_request(range(10, 15), 12) for _ in range(3))
    bench.add(older, newer)
    bench.step()
    bench.add(last)
    outputs = bench.run()
    assert newer.num_preemptions > 0
    assert [o.request for o in outputs if o.finish_reason] == [older, newer, last]


def test_a_newcomer_leaves_its_elders_a_block_each() -> None:
    bench = Bench(num_blocks=4, max_batch_tokens=64)
    elder = make_request([11, 12, 13], 12)
    bench.add(elder)
    bench.step()
    bench.add(make_request(range(20, 32), 4))  # 3 blocks: all that is free
    bench.step()
    assert bench.scheduler.load.num_running == 1


def test_a_request_that_can_never_fit_is_refused() -> None:
    bench = Bench(num_blocks=4)
    with pytest.raises(CapacityError) as refused:
        bench.add(make_request(range(10, 20), max_tokens=7))
    assert (refused.value.num_tokens, refused.value.capacity) == (17, 16)
    bench.add(make_request(range(10, 20), max_tokens=6))
    assert reasons(bench.run()) == [FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, 90), (5, 5), (90, 90), (91, 90), (2**31 - 1, 90)]
)
def test_max_tokens_is_clamped_to_the_context(asked: int | None, expected: int) -> None:
    assert Capacity(max_model_len=100, kv_tokens=400).max_tokens(10, asked) == expected


def test_max_tokens_meets_the_kv_cache() -> None:
    small = Capacity(max_model_len=100, kv_tokens=50)
    assert small.max_tokens(10, None) == 40
    assert small.max_tokens(10, 40) == 40
    assert small.max_output_tokens == 49
    with pytest.raises(CapacityError):
        small.max_tokens(10, 41)
    with pytest.raises(CapacityError):
        small.max_tokens(50, None)


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_id_ends_and_shows_only_where_asked(include_stop: bool) -> None:
    bench = Bench()
    second = expected_tokens([11, 12, 13], 2)[1]
    request = make_request(max_tokens=9, stop=[second], include_stop=include_stop)
    bench.add(request)
    last = bench.run()[-1]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, second)
    assert last.tokens == ((SampledToken(second),) if include_stop else ())
    assert len(request.completion_token_ids) == 2


def test_eos_ends_and_never_shows() -> None:
    bench = Bench()
    bench.runner.forced[5] = EOS
    request = make_request(max_tokens=9, include_stop=True)
    bench.add(request)
    last = bench.run()[-1]
    assert (last.finish_reason, last.stop_token_id, last.tokens) == (FinishReason.STOP, EOS, ())
    assert len(request.completion_token_ids) == 3


def test_min_tokens_masks_what_would_end() -> None:
    bench = Bench()
    bench.runner.forced = dict.fromkeys(range(3, 12), EOS)
    request = make_request(max_tokens=9, min_tokens=4)
    bench.add(request)
    bench.run()
    assert len(request.completion_token_ids) == 5
    masks = [batch.rows[0].masked_token_ids for batch in bench.runner.batches]
    assert masks == [frozenset({EOS})] * 4 + [frozenset()]


@pytest.mark.matrix("R53")
def test_a_failed_row_ends_alone() -> None:
    bench = Bench()
    good, bad = make_request([11, 12]), make_request([9, 98])
    bench.runner.fail_row = lambda row: ValueError("row") if 9 in row.token_ids else None
    bench.add(good, bad)
    outputs = bench.run()
    failed = [output for output in outputs if output.request is bad]
    assert [output.finish_reason for output in failed] == [FinishReason.ERROR]
    assert isinstance(failed[0].error, ValueError)
    assert good.completion_token_ids == expected_tokens([11, 12], 4)
    assert bench.scheduler.load.kv_usage == 0


@pytest.mark.matrix("R41")
def test_a_cancel_between_schedule_and_update_wins() -> None:
    bench = Bench()
    request = make_request(max_tokens=1)  # its only step is its last
    bench.add(request)
    batch = bench.scheduler.schedule()
    assert batch is not None
    cancelled = bench.scheduler.cancel(request)
    assert cancelled is not None
    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert bench.scheduler.load.kv_usage == 0
    assert bench.scheduler.update(batch, bench.runner.execute(batch)) == []
    assert bench.scheduler.cancel(request) is None


def test_a_cancelled_waiting_request_never_runs() -> None:
    bench = Bench(max_batch_requests=1)
    first, second = make_request(), make_request()
    bench.add(first, second)
    bench.step()
    bench.scheduler.cancel(second)
    bench.run()
    assert second.times.scheduled is None
    assert bench.scheduler.load.waiting_prompt_tokens == 0


@pytest.mark.matrix("R46")
def test_deadlines_end_waiting_and_running_requests() -> None:
    bench = Bench(max_batch_requests=1)
    deadline = bench.clock.now + 10**9
    running, waiting = (make_request(max_tokens=90, deadline=deadline) for _ in range(2))
    bench.add(running, waiting)
    bench.step()
    assert bench.scheduler.expire() == []
    bench.clock.advance(1)
    ended = bench.scheduler.expire()
    assert [output.request for output in ended] == [running, waiting]
    assert reasons(ended) == [FinishReason.DEADLINE] * 2
    assert not bench.scheduler.has_work
    assert bench.scheduler.schedule() is None
    assert waiting.times.scheduled is None


def test_a_lost_step_ends_what_ran_and_keeps_what_waits() -> None:
    bench = Bench(max_batch_requests=1)
    running, waiting = make_request(), make_request()
    bench.add(running, waiting)
    bench.step()
    lost = bench.scheduler.fail_running(RuntimeError("step"))
    assert [output.request for output in lost] == [running]
    assert bench.scheduler.load.kv_usage == 0
    bench.run()
    assert waiting.completion_token_ids == expected_tokens([11, 12, 13], 4)


def test_results_that_do_not_match_the_batch_are_refused() -> None:
    bench = Bench()
    bench.add(make_request())
    batch = bench.scheduler.schedule()
    assert batch is not None
    with pytest.raises(ValueError, match="zip"):
        bench.scheduler.update(batch, [])


def test_load_counts_what_waits_and_runs() -> None:
    bench = Bench(max_batch_requests=1)
    bench.add(make_request([11] * 5), make_request([12] * 7))
    load = bench.scheduler.load
    assert (load.num_running, load.num_waiting, load.waiting_prompt_tokens) == (0, 2, 12)
    bench.step()
    load = bench.scheduler.load
    assert (load.num_running, load.num_waiting, load.waiting_prompt_tokens) == (1, 1, 7)
    assert load.kv_usage == 2 / 64


def test_more_rows_than_tokens_a_step_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="max_batch_requests"):
        Bench(max_batch_requests=17)


def test_an_urgent_request_takes_the_row_of_a_lesser_one() -> None:
    bench = Bench(max_batch_requests=2)
    older, newer = make_request([11], 12), make_request([12], 12)
    bench.add(older, newer)
    bench.step()
    urgent, equal = make_request([13], 12, priority=1), make_request([14], 12)
    bench.add(equal, urgent)
    bench.step()
    assert (older.num_preemptions, newer.num_preemptions) == (0, 1)
    assert urgent.times.scheduled is not None
    outputs = bench.run()
    ended = [output.request for output in outputs if output.finish_reason]
    assert ended.index(newer) < ended.index(equal)  # who ran before is next
    assert (newer.num_preemptions, urgent.num_preemptions) == (1, 0)
    for request in (older, newer, urgent, equal):
        assert request.completion_token_ids == expected_tokens(request.prompt_token_ids, 12)


def test_an_urgent_request_takes_blocks_only_where_that_lets_it_start() -> None:
    bench = Bench(num_blocks=8, max_batch_tokens=64)
    high, low = make_request([11] * 14, 6, priority=1), make_request([12] * 5, 10)
    bench.add(high, low)
    bench.step()
    # with what `low` holds there would be 3 blocks: too few for 4 and one for the elder's growth
    too_big = make_request([13] * 13, 4, priority=1)
    bench.add(too_big)
    bench.step()
    assert low.num_preemptions == 0
    bench.scheduler.cancel(too_big)
    fits = make_request([14] * 9, 4, priority=1)
    bench.add(fits)
    bench.step()
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)
    bench.run()
    assert low.completion_token_ids == expected_tokens([12] * 5, 10)


def test_an_urgent_prompt_overtakes_a_lesser_prefill() -> None:
    bench = Bench()
    long, urgent = make_request(range(10, 110), 1), make_request([11] * 9, 1, priority=1)
    bench.add(long)
    bench.step()
    bench.add(urgent)
    outputs = bench.step()
    assert [output.request for output in outputs] == [urgent]
    assert bench.grants() == [9, 7]
    bench.run()
    assert long.completion_token_ids == expected_tokens(range(10, 110), 1)


def test_who_waits_too_long_to_start_is_told_so() -> None:
    bench = Bench(max_batch_requests=1, max_queue_seconds=2.0)
    running, waiting, sibling = make_request(), make_request(), make_request(index=1)
    for request in (running, waiting, sibling):
        request.times.arrived = bench.clock.now
    bench.add(running, waiting, sibling)
    bench.step()
    bench.clock.advance(1.9)
    assert bench.scheduler.expire() == []
    bench.clock.advance(0.2)
    (ended,) = bench.scheduler.expire()
    assert ended.request is waiting
    assert isinstance(ended.error, QueueTimeoutError)
    assert ended.error.retry_after == 2
    assert bench.scheduler.load.num_waiting == 1  # a sibling starts after the one that counts


def test_who_was_preempted_is_not_timed_out() -> None:
    bench = Bench(max_batch_requests=1, max_queue_seconds=2.0)
    low, urgent = make_request(), make_request(priority=1)
    for request in (low, urgent):
        request.times.arrived = bench.clock.now
    bench.add(low)
    bench.step()
    bench.add(urgent)
    bench.step()
    assert low.num_preemptions == 1
    bench.clock.advance(60)
    assert bench.scheduler.expire() == []
    assert reasons(bench.run()) == [FinishReason.LENGTH] * 2


def test_a_step_that_lacks_memory_is_taken_back_and_retried_smaller() -> None:
    bench = Bench()
    long, short = make_request(range(10, 30), 300 // 2), make_request([11, 12], 20)
    bench.add(short)
    bench.step()
    bench.add(long)
    assert bench.scheduler.schedule() is not None  # 16 tokens, never computed
    assert bench.scheduler.retry_smaller()
    assert bench.scheduler.load.kv_usage == 0
    bench.step()
    assert sum(bench.grants()) == 8
    assert bench.scheduler.retry_smaller()
    bench.step()
    assert sum(bench.grants()) == 4
    bench.run()
    for request in (long, short):
        prompt, most = request.prompt_token_ids, request.stopping.max_tokens
        assert request.completion_token_ids == expected_tokens(prompt, most)


def test_steps_grow_again_and_one_token_is_the_least() -> None:
    bench = Bench(max_batch_tokens=4, num_blocks=200, max_model_len=800)
    for expected in (True, True, False, False):
        assert bench.scheduler.retry_smaller() is expected
    bench.add(make_request([11], 600))
    bench.run()
    bench.add(make_request(range(10, 20), 1))
    bench.step()
    assert bench.grants() == [4]
