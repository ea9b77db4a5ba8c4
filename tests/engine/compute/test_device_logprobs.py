"""Log-probabilities that are launched now and read later: the same as those of `logprobs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow, RowResult, ScoredPrompt
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SampledToken, SamplingOptions
from nanoinfer_engine.sampling import logprobs
from nanoinfer_engine.sampling.device_logprobs import measure_prompts, measure_sampled
from nanoinfer_engine.sampling.logprobs import score, score_prompts

VOCAB_SIZE = 300
GREEDY = SamplingOptions(0.0, 0, 1.0, 0.0, 0)
ASKED: list[tuple[int | None, tuple[int, ...]]] = [
    (None, ()),
    (0, ()),
    (5, ()),
    (2, (9, 200)),
    (0, tuple(range(100, 228))),
    (20, (7, 8)),
]


def make_row(num_logprobs: int | None, listed: Sequence[int] = ()) -> BatchRow:
    options = dataclasses.replace(
        GREEDY, num_logprobs=num_logprobs, logprob_token_ids=tuple(listed)
    )
    return BatchRow((0,), 3, (0,), True, options)


def random_logits(num_rows: int) -> torch.Tensor:
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(num_rows))
    return (3 * logits).half()  # ties among them


@pytest.mark.parametrize("count", [6, 200])
def test_sampled_ids_are_scored_as_on_the_host(count: int) -> None:
    rows = [make_row(*ASKED[index % len(ASKED)]) for index in range(count)]
    logits = random_logits(count)
    sampled = torch.randint(VOCAB_SIZE, (count,), dtype=torch.int32)
    places = {index: count - 1 - index for index in range(count)}
    results: list[RowResult] = [(SampledToken(int(sampled[places[i]])),) for i in range(count)]
    expected = list(results)
    for index, row in enumerate(rows):
        options, place = row.sampling, places[index]
        if options.num_logprobs is not None:
            expected[index] = tuple(
                score(
                    logits[place : place + 1].float(),
                    [int(sampled[place])],
                    options.num_logprobs,
                    options.logprob_token_ids,
                )
            )
    for scores in measure_sampled(rows, places, logits, sampled):
        scores.add_to(results)
    assert results == expected


def test_rows_that_failed_stay_failed_and_new_failures_stay_alone() -> None:
    rows = [make_row(1), make_row(1), make_row(1, [VOCAB_SIZE]), make_row(1, [-1]), make_row(1)]
    logits = random_logits(5)
    logits[1, 7] = torch.nan
    sampled = torch.tensor([-1, 4, 4, 4, 4], dtype=torch.int32)
    failure = SamplingError("before")
    results: list[RowResult] = [failure, *((SampledToken(4),) for _ in range(4))]
    for scores in measure_sampled(rows, {i: i for i in range(5)}, logits, sampled):
        scores.add_to(results)
    assert results[0] is failure
    assert all(isinstance(each, SamplingError) for each in results[1:4])
    assert results[4] == tuple(score(logits[4:].float(), [4], 1, ()))


def scored_row(num_tokens: int, num_scored: int, num_top: int, listed: Sequence[int]) -> BatchRow:
    options = dataclasses.replace(
        GREEDY, num_prompt_logprobs=num_top, logprob_token_ids=tuple(listed)
    )
    ids = tuple((7 * i) % VOCAB_SIZE for i in range(num_scored))
    return BatchRow((1,) * num_tokens, 0, (0,), False, options, scored_token_ids=ids)


def test_prompts_are_scored_as_on_the_host_whatever_the_order_of_rows() -> None:
    rows = [
        BatchRow((1, 2, 3), 0, (0,), True, GREEDY),
        scored_row(130, 129, 3, (5, 6)),
        scored_row(4, 4, 0, ()),
        BatchRow((1,), 9, (0,), True, GREEDY),
        scored_row(2, 2, 1, (VOCAB_SIZE,)),
        scored_row(3, 2, 1, ()),
        scored_row(3, 2, 1, ()),
    ]
    logits = random_logits(sum(row.num_tokens for row in rows))
    logits[-3] = torch.nan  # the first token of the last row
    order = [3, 0, 1, 2, 4, 5, 6]
    parts = logits.split([row.num_tokens for row in rows])
    ordered = torch.cat([parts[index] for index in order])
    results: list[RowResult] = [(SampledToken(1),), (), (), (SampledToken(2),), (), (), ()]
    results[5] = SamplingError("before")
    expected = score_prompts(rows, logits, results, lambda part: part)
    for scores in measure_prompts(rows, order, lambda first, n: ordered[first : first + n]):
        scores.add_to(results)
    assert isinstance(results[1], ScoredPrompt)
    assert results[:4] == expected[:4]
    assert isinstance(expected[4], Exception)
    assert isinstance(results[4], SamplingError)
    assert str(results[5]) == "before"
    assert isinstance(results[6], SamplingError)


def test_counting_and_sorting_find_the_same_ranks() -> None:
    values = torch.log_softmax(random_logits(5).float(), dim=-1)
    asked = values[:, :129].contiguous()
    assert torch.equal(1 + logprobs._num_larger(values, asked), logprobs._ranks(values, asked))
