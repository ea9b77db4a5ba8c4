"""Steps in which somebody decodes have a bound of their own, so that streams keep flowing."""

from __future__ import annotations

import random

import pytest
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.scheduler import Scheduler

from tests.engine.control.bench import Bench
from tests.engine.control.test_running_ahead import Loop
from tests.engine.fakes import expected_tokens, make_config, make_request


def test_a_long_prompt_beside_streams_comes_in_smaller_chunks() -> None:
    bench = Bench(max_mixed_tokens=6)
    bench.add(make_request(max_tokens=50), make_request(max_tokens=50))
    bench.step()
    bench.add(make_request(range(10, 50), max_tokens=2))
    grants = []
    for _ in range(11):
        bench.step()
        grants.append(bench.grants())
    assert grants == [[1, 1, 4]] * 10 + [[1, 1, 1]]


def test_without_streams_a_prompt_has_the_whole_step() -> None:
    bench = Bench(max_mixed_tokens=6)
    bench.add(make_request(range(10, 50), max_tokens=1), make_request(range(60, 80), max_tokens=1))
    bench.run()
    assert [batch.num_tokens for batch in bench.runner.batches] == [16, 16, 16, 12]


def test_decodes_are_not_cut() -> None:
    bench = Bench(max_mixed_tokens=4)
    streams = [make_request([11 + i], max_tokens=12) for i in range(4)]
    bench.add(*streams[:3])
    bench.step()
    bench.add(streams[3])
    bench.step()
    assert bench.grants() == [1, 1, 1, 1]
    bench.add(make_request(range(30, 60)))
    bench.step()
    assert bench.grants() == [1, 1, 1, 1]


def test_no_bound_of_its_own_means_the_steps() -> None:
    bench = Bench()
    bench.add(make_request(max_tokens=50))
    bench.step()
    bench.add(make_request(range(10, 50)))
    bench.step()
    assert bench.grants() == [1, 15]


@pytest.mark.parametrize(("mixed", "wanted"), [(12, [1, 7]), (6, [1, 5])])
def test_a_step_that_memory_made_smaller_keeps_to_both_bounds(
    mixed: int, wanted: list[int]
) -> None:
    bench = Bench(max_mixed_tokens=mixed)
    stream, prompt = make_request(max_tokens=30), make_request(range(10, 50), max_tokens=2)
    bench.add(stream)
    bench.step()
    assert bench.scheduler.retry_smaller()  # 8 tokens a step from here
    bench.step()
    bench.add(prompt)
    bench.step()
    assert bench.grants() == wanted
    bench.run()
    assert stream.completion_token_ids == expected_tokens([11, 12, 13], 30)
    assert prompt.completion_token_ids == expected_tokens(range(10, 50), 2)


def test_a_stream_with_an_id_still_to_be_read_counts() -> None:
    loop = Loop(max_mixed_tokens=6)
    loop.add(make_request(max_tokens=20, num_logprobs=1))
    for _ in range(2):
        loop.step()
    loop.add(make_request(range(10, 50), max_tokens=1))
    for _ in range(4):
        loop.step()
    assert [batch.num_tokens for batch in loop.runner.batches[-4:]] == [6, 6, 6, 6]


def test_what_ends_with_the_step_in_flight_is_no_stream() -> None:
    loop = Loop(max_mixed_tokens=6)
    loop.add(*(make_request(range(base, base + 16), max_tokens=1) for base in (10, 40, 70)))
    loop.run()
    assert [batch.num_tokens for batch in loop.runner.batches] == [16, 16, 16]


def test_less_than_a_token_for_everybody_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="max_mixed_tokens"):
        Scheduler(make_config(max_mixed_tokens=3), Capacity(256, 256))


@pytest.mark.parametrize("seed", range(8))
def test_random_loads_keep_to_it_and_give_the_same_tokens(seed: int) -> None:
    source = random.Random(seed)
    mixed = source.choice((4, 5, 9))
    loop = Loop(num_blocks=24, max_mixed_tokens=mixed)
    requests, sizes = [], []

    def step() -> None:
        running, count = loop.scheduler._running, len(loop.runner.batches)
        streams = any(r.num_pending_tokens == 1 and r.wants_more for r in running)
        loop.step()
        if streams:
            sizes.extend(batch.num_tokens for batch in loop.runner.batches[count:])

    for _ in range(12):
        prompt = [source.randrange(10, 99) for _ in range(source.randint(1, 40))]
        requests.append(make_request(prompt, max_tokens=source.randint(1, 20)))
        loop.add(requests[-1])
        for _ in range(source.randint(0, 5)):
            step()
    while loop.scheduler.has_work or loop.pipeline.is_busy:
        step()
    for request in requests:
        wanted = expected_tokens(request.prompt_token_ids, request.stopping.max_tokens)
        assert request.completion_token_ids == wanted[: len(request.completion_token_ids)]
        assert request.times.finished is not None
    assert 1 < max(sizes) <= mixed
