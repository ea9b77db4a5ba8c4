"""Prompts that begin alike share full blocks: nothing is computed twice, nothing else changes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_engine.step.runner import ModelRunner

from tests.engine.control.bench import Bench
from tests.engine.control.conftest import Engine, StartFake, start_engine
from tests.engine.fakes import FakeRunner, expected_tokens, make_request
from tests.engine.tiny_checkpoints import VOCAB_SIZE

LONG = list(range(10, 50))  # 10 blocks of 4
SIX = pb.StoppingParams(max_tokens=6, ignore_eos=True)
GREEDY = pb.SamplingParams(temperature=0)


def starts(bench: Bench) -> list[int]:
    return [row.start for row in bench.runner.batches[-1].rows]


def test_a_second_identical_prompt_computes_its_last_block_alone() -> None:
    bench = Bench(num_blocks=600, max_batch_tokens=2048, max_model_len=2000)
    prompt = [10 + i % 900 for i in range(1000)]
    first, second = make_request(prompt, 5), make_request(prompt, 5)
    bench.add(first)
    bench.run()
    bench.add(second)
    bench.step()
    assert bench.grants() == [4]
    assert starts(bench) == [996]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 996)
    bench.run()
    assert second.completion_token_ids == expected_tokens(prompt, 5)


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_is_always_computed(length: int, cached: int) -> None:
    bench = Bench()
    for expected in (0, cached):
        request = make_request(LONG[:length], 1)
        bench.add(request)
        bench.run()
        assert request.num_cached_tokens == expected


def test_a_completion_serves_the_next_turn() -> None:
    bench = Bench(max_batch_tokens=64)
    first = make_request(LONG[:6], 11)
    bench.add(first)
    bench.run()
    # 17 tokens are known, and all but the last one were computed: 4 blocks
    second = make_request([*first.prompt_token_ids, *first.completion_token_ids, 7, 8], 3)
    bench.add(second)
    bench.run()
    assert second.num_cached_tokens == 16
    assert second.completion_token_ids == expected_tokens(second.prompt_token_ids, 3)


def test_alike_requests_in_one_step_share_at_once() -> None:
    bench = Bench(max_batch_tokens=64)
    requests = [make_request(LONG, 5, seed=seed) for seed in range(4)]
    bench.add(*requests)
    bench.step()
    assert bench.grants() == [40, 4, 4, 4]
    # 9 full blocks for all, then the last one of the prompt for each; decoding takes one more
    assert bench.scheduler.load.kv_usage == (9 + 4) / 64
    bench.run()
    for request in requests:
        assert request.completion_token_ids == expected_tokens(LONG, 5, request.sampling.seed)
    assert bench.scheduler.load.kv_usage == 0


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    bench = Bench(max_batch_tokens=64)
    common = LONG[4:20]
    for first in ([1, 1, 1, 1], [2, 2, 2, 2]):
        request = make_request([*first, *common], 3)
        bench.add(request)
        bench.run()
        assert request.num_cached_tokens == 0
        assert request.completion_token_ids == expected_tokens([*first, *common], 3)


@pytest.mark.matrix("R85")
def test_salts_and_tenants_keep_apart() -> None:
    bench = Bench(max_batch_tokens=64)
    kinds: list[dict[str, str]] = [
        {},
        {"tenant": "a"},
        {"tenant": "b"},
        {"cache_salt": "a"},
        {"cache_salt": ""},
        {"tenant": "a", "cache_salt": "b"},
    ]
    for kind in kinds:
        for cached in (0, 36):
            request = make_request(LONG, 1, **kind)  # type: ignore[arg-type]
            bench.add(request)
            bench.run()
            assert request.num_cached_tokens == cached, kind


def test_switched_off_or_scoring_the_prompt_reads_nothing() -> None:
    off = Bench(prefix_caching=False)
    on = Bench()
    for bench in (off, off, on, on):
        request = make_request(LONG, 2)
        if bench is on:
            request.sampling = replace(request.sampling, num_prompt_logprobs=0)
        bench.add(request)
        bench.run()
        assert request.num_cached_tokens is None
        assert request.completion_token_ids == expected_tokens(LONG, 2)
    assert on.runner.batches[4].rows[0].start == 0  # after three chunks and a decode
    plain = make_request(LONG, 2)  # what the scoring ones computed is there for others
    on.add(plain)
    on.run()
    assert plain.num_cached_tokens == 36


def test_memory_taken_by_others_is_computed_again() -> None:
    bench = Bench(num_blocks=12, max_batch_tokens=64)
    bench.add(make_request(LONG, 1))
    bench.run()
    bench.add(make_request([9] * 20, 1))  # 5 blocks: the 2 free ones, then 3 from the chain's end
    bench.run()
    again = make_request(LONG, 1)
    bench.add(again)
    bench.run()
    assert again.num_cached_tokens == 28
    assert again.completion_token_ids == expected_tokens(LONG, 1)


def test_a_preempted_request_finds_its_blocks_again() -> None:
    bench = Bench(max_batch_requests=1, max_batch_tokens=64)
    low, urgent = make_request(LONG, 10), make_request([9], 1, priority=1)
    bench.add(low)
    bench.step()
    bench.add(urgent)
    bench.step()
    assert low.num_preemptions == 1
    bench.step()
    assert starts(bench) == [40]  # all ten blocks of the prompt, and the token after it is computed
    assert low.num_cached_tokens == 0  # that is said of the first start
    bench.run()
    assert low.completion_token_ids == expected_tokens(LONG, 10)


def test_what_a_failed_row_leaves_is_not_found() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.runner.fail_row = lambda row: ValueError()
    bench.add(make_request(LONG))
    bench.run()
    bench.runner.fail_row = lambda row: None
    request = make_request(LONG)
    bench.add(request)
    bench.run()
    assert request.num_cached_tokens == 0


async def test_usage_prompt_info_and_metrics_tell_what_was_cached(fake: Engine) -> None:
    cold = await fake.generate(LONG, stopping=SIX, sampling=pb.SamplingParams(seed=0))
    warm = await fake.generate(LONG, stopping=SIX, sampling=pb.SamplingParams(seed=0, n=3))
    for answer, cached in ((cold, 0), (warm, 36)):
        assert answer.messages[0].prompt_info.cached_tokens == cached
        assert answer.summary.usage.cached_tokens == cached
        assert answer.summary.usage.prompt_tokens == 40
        assert answer.tokens() == expected_tokens(LONG, 6)
    await fake.idle()
    counters = fake.service._engine.statistics.counters
    assert counters["cache_queries"] == counters["prompt_tokens"] == 4 * 40
    assert counters["cache_hits"] == counters["cached_tokens"] == 3 * 36


async def test_completions_of_one_request_share_its_prompt(start_fake: StartFake) -> None:
    async with start_fake(FakeRunner(num_blocks=16), max_batch_tokens=64) as engine:
        answer = await engine.generate(LONG, stopping=SIX, sampling=pb.SamplingParams(seed=0, n=4))
        for index in range(4):
            assert answer.tokens(index) == expected_tokens(LONG, 6, index)
        # four prompts of 10 blocks would not fit 16
        assert answer.summary.usage.cached_tokens == 0
        assert engine.service._engine.statistics.counters["cached_tokens"] == 3 * 36
        assert max(len(batch.rows) for batch in engine.runner.batches) >= 3


async def test_salt_and_tenant_arrive_from_the_wire(fake: Engine) -> None:
    async def cached(tenant: str | None = None, **fields: Any) -> int:
        metadata = [("x-nanoinfer-tenant", tenant)] if tenant else None
        answer = await fake.generate(LONG, stopping=SIX, metadata=metadata, **fields)
        return answer.summary.usage.cached_tokens

    assert await cached() == 0
    assert await cached() == 36
    assert await cached(tenant="a") == 0
    assert await cached(tenant="a", cache_salt="s") == 0
    assert await cached(tenant="b", cache_salt="s") == 36
    assert await cached(tenant="b") == 0
    assert await cached(tenant="a") == 36


@pytest.mark.parametrize("on", [True, False])
async def test_the_feature_is_announced_where_it_is_on(start_fake: StartFake, on: bool) -> None:
    async with start_fake(prefix_caching=on) as engine:
        reply = await engine.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
        assert (pb.FEATURE_PREFIX_CACHING in reply.model.features) is on
        await engine.generate(LONG, stopping=SIX)
        again = await engine.generate(LONG, stopping=SIX, cache_salt="s")
        assert again.summary.usage.cached_tokens == 0


async def test_a_real_model_gives_the_same_tokens_with_and_without(tiny_model: Path) -> None:
    """Prompts that fork from a common beginning: alone without a cache, then at once with one."""
    common = [(7 * i) % VOCAB_SIZE for i in range(90)]
    prompts = [[*common[: 20 * (1 + i % 4)], *range(i, i + 12)] for i in range(12)]
    settings: dict[str, Any] = {"threads": 1, "block_size": 8}
    settings |= {"max_batch_tokens": 48, "max_batch_requests": 12}
    answers, cached = [], []
    for on in (False, True):
        async with start_engine(
            ModelRunner,
            model=tiny_model,
            kv_cache_memory="640KiB",
            prefix_caching=on,
            **settings,
        ) as engine:
            calls = [
                engine.generate(
                    prompt,
                    stopping=pb.StoppingParams(max_tokens=24, ignore_eos=True),
                    sampling=GREEDY if i % 2 else pb.SamplingParams(seed=i),
                )
                for i, prompt in enumerate(prompts)
            ]
            one_by_one = [await call for call in calls] if not on else []
            results = one_by_one or await asyncio.gather(*calls)
            answers.append([answer.tokens() for answer in results])
            cached.append(sum(answer.summary.usage.cached_tokens for answer in results))
            await engine.idle()
    assert answers[0] == answers[1]
    assert cached[0] == 0
    assert cached[1] > 200
