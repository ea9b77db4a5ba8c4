"""Penalties, bias and masks: against transformers and the definition, in order, row by row."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SampledToken, SamplingOptions, TokenCounts
from nanoinfer_engine.sampling import processors, shaping
from nanoinfer_engine.sampling.processors import PROCESSORS
from nanoinfer_engine.sampling.processors.base import DeviceBias, LogitsProcessor
from nanoinfer_engine.sampling.sampler import sample
from nanoinfer_engine.sampling.shaping import shape
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

VOCAB_SIZE = 50
GREEDY = SamplingOptions(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def make_row(
    prompt: Sequence[int] = (1,),
    completion: Sequence[int] = (),
    masked: Sequence[int] = (),
    **options: object,
) -> BatchRow:
    sampling = dataclasses.replace(GREEDY, **options)  # type: ignore[arg-type]
    counts = None
    if sampling.has_penalties:
        counts = TokenCounts(prompt)
        for token_id in completion:
            counts.add(token_id)
    start = len(prompt) + len(completion) - 1
    return BatchRow((0,), start, (0,), True, sampling, frozenset(masked), counts)


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
    st.lists(st.integers(0, 9), max_size=40),
)
def test_counts_are_those_of_the_completion_and_ids_those_of_both(
    prompt: list[int], completion: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for token_id in completion:
        counts.add(token_id)
    assert list(counts.token_ids) == list(dict.fromkeys(prompt + completion))
    seen = Counter(completion)
    assert list(counts.counts) == [seen[token_id] for token_id in counts.token_ids]


@pytest.mark.parametrize("penalty", [1e-3, 0.5, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(2)
    histories = [([3, 4, 4, 9], [9, 12]), ([7], [7, 7, 1])]
    rows = [make_row(p, c, repetition_penalty=penalty) for p, c in histories]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for index, (prompt, completion) in enumerate(histories):
        expected = processor(torch.tensor([prompt + completion]), logits[index : index + 1].clone())
        assert torch.equal(shape(logits, rows)[index], expected[0])


def test_bias_is_that_of_transformers() -> None:
    logits = random_logits(1, 1)
    bias = {3: 2.5, 40: -100.0, 0: 100.0}
    processor = SequenceBiasLogitsProcessor([[[key], value] for key, value in bias.items()])
    expected = processor(torch.tensor([[5, 6]]), logits.clone())
    shaped = shape(logits, [make_row(logit_bias=tuple(bias.items()))])
    assert torch.allclose(shaped, expected)


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, -2.0), (2.0, 1.5)])
def test_frequency_and_presence_count_the_completion_alone(
    frequency: float, presence: float
) -> None:
    logits = random_logits(1, 2)
    row = make_row([1, 2], [2, 5, 5, 5], frequency_penalty=frequency, presence_penalty=presence)
    expected = logits[0].clone()
    for token_id, count in Counter([2, 5, 5, 5]).items():
        expected[token_id] -= frequency * count + presence
    assert torch.allclose(shape(logits, [row])[0], expected)
    assert shape(logits, [row])[0, 1] == logits[0, 1]


def test_the_order_is_penalties_then_bias_then_allowed_then_masked() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, :4] = torch.tensor([4.0, 4.0, -4.0, 1.0])
    row = make_row(
        [0, 2],
        [0],
        masked=[3],
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias=((0, 10.0), (3, 100.0), (9, 100.0)),
        allowed_token_ids=array("q", [0, 1, 2, 3, 3]),
    )
    shaped = shape(logits, [row])[0]
    assert shaped[:4].tolist() == [4 / 2 - 0.5 - 0.25 + 10, 4, -8, -math.inf]
    assert bool(torch.isinf(shaped[4:]).all())


def test_nothing_to_do_touches_nothing() -> None:
    logits = random_logits(2)
    assert shape(logits, [make_row(), make_row(num_logprobs=3, temperature=1.0)]) is logits


KINDS: list[dict[str, object]] = [
    {},
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 0.9, "presence_penalty": -0.3, "temperature": 0.8},
    {"logit_bias": ((4, 50.0), (5, -50.0)), "temperature": 1.0},
    {"allowed_token_ids": array("q", [7, 8, 9]), "temperature": 1.0},
    {"masked": [1, 2, 3]},
    {"temperature": 1.0, "top_k": 5, "repetition_penalty": 0.6, "num_logprobs": 2},
    {"num_logprobs": 0, "logprob_token_ids": (3, 8)},
]


def mixed_rows() -> list[BatchRow]:
    return [
        make_row([i % 9, 3], [i % 7, 4, 4], seed=i, **kind)  # type: ignore[arg-type]
        for i, kind in enumerate(KINDS * 3)
    ]


@pytest.mark.matrix("R23")
def test_a_row_is_the_same_alone_and_in_company() -> None:
    rows = mixed_rows()
    logits = random_logits(len(rows), 4)
    before = logits.clone()
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    assert sample(logits, rows) == alone
    assert sample(logits.flip(0), rows[::-1])[::-1] == alone
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "hostile",
    [
        make_row(logit_bias=((VOCAB_SIZE, 100.0),)),
        make_row(logit_bias=((-1, 100.0),)),
        make_row(allowed_token_ids=array("q", [VOCAB_SIZE + 3])),
        make_row(allowed_token_ids=array("q", [])),
        make_row(masked=[VOCAB_SIZE * 2]),
        make_row([10**9], repetition_penalty=1.1),
        make_row(num_logprobs=1, logprob_token_ids=(VOCAB_SIZE,)),
    ],
)
def test_a_hostile_row_fails_alone(hostile: BatchRow) -> None:
    rows = mixed_rows()
    logits = random_logits(len(rows) + 1, 5)
    expected = sample(torch.cat([logits[:3], logits[4:]]), rows)
    results = sample(logits, [*rows[:3], hostile, *rows[3:]])
    assert isinstance(results.pop(3), Exception)
    assert results == expected


def test_the_errors_are_told_as_sampling_errors() -> None:
    (result,) = sample(random_logits(1), [make_row(logit_bias=((VOCAB_SIZE, 1.0),))])
    assert isinstance(result, SamplingError)


@pytest.mark.parametrize("penalty", [1e-45, 1e-30, 10.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 2.0])
def test_extreme_penalties_leave_something_to_choose(penalty: float, temperature: float) -> None:
    row = make_row(
        range(VOCAB_SIZE),
        repetition_penalty=penalty,
        frequency_penalty=2.0,
        logit_bias=((1, 100.0),),
        temperature=temperature,
    )
    (result,) = sample(random_logits(1), [row])
    assert isinstance(result, SampledToken)


def ngram_row(ids: Sequence[int], size: int) -> BatchRow:
    row = make_row(ids[:1], ids[1:], extensions=(("no_repeat_ngram_size", size),))
    return row._replace(known_token_ids=tuple(ids))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_ngrams_that_may_not_come_again_are_those_of_transformers(
    texts: list[list[int]], size: int
) -> None:
    logits = random_logits(len(texts))
    rows = [ngram_row(ids, size) for ids in texts]
    shaped = shape(logits, rows)
    for index, ids in enumerate(texts):
        processor = NoRepeatNGramLogitsProcessor(size)
        expected = processor(torch.tensor([ids]), logits[index : index + 1].clone())
        assert torch.equal(shaped[index], expected[0])
        assert not processors.may_run_ahead(rows[index].sampling)


def test_a_row_that_does_not_bring_its_ids_fails_instead_of_repeating() -> None:
    row = ngram_row([1, 2, 1], 2)._replace(known_token_ids=())
    (result,) = sample(random_logits(1), [row])
    assert isinstance(result, SamplingError)


class Doubling(LogitsProcessor):
    """Adds to each id of the row's known ids as much as it has come, on any device."""

    def wants(self, row: BatchRow) -> bool:
        return bool(row.known_token_ids)

    def apply(self, logits: torch.Tensor, rows: Mapping[int, BatchRow]) -> None:
        for index, row in rows.items():
            for token_id in row.known_token_ids:
                logits[index, token_id] += 1

    def add_bias(self, bias: DeviceBias, row: BatchRow) -> None:
        bias.add((token_id, 1.0) for token_id in row.known_token_ids)

    def version(self, row: BatchRow) -> Hashable:
        return row.known_token_ids

    def reads_token_ids(self, sampling: SamplingOptions) -> bool:
        return sampling.extension("doubling", 0) > 0


IDS = st.integers(0, VOCAB_SIZE - 1)


@given(
    st.lists(IDS, max_size=12),
    st.dictionaries(IDS, st.floats(-100, 100, width=32), max_size=12),
    st.none() | st.lists(IDS, max_size=12),
    st.frozensets(IDS, max_size=12),
)
def test_what_a_device_adds_is_what_the_host_does(
    known: list[int], bias: dict[int, float], allowed: list[int] | None, masked: frozenset[int]
) -> None:
    """Whatever stands before, between and behind in the order of processors."""
    row = make_row(
        masked=list(masked),
        logit_bias=tuple(bias.items()),
        allowed_token_ids=None if allowed is None else array("q", allowed),
        extensions=(("doubling", 1),),
    )._replace(known_token_ids=tuple(known))
    logits = random_logits(1)
    for place in range(len(PROCESSORS) + 1):
        order = (*PROCESSORS[:place], Doubling(), *PROCESSORS[place:])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processors, "PROCESSORS", order)
            patch.setattr(shaping, "PROCESSORS", order)
            assert not processors.may_run_ahead(row.sampling)
            added = processors.device_bias(row)
            expected = shape(logits, [row])[0]
        summands = torch.full((VOCAB_SIZE,), added.base)
        ids, values = added.entries()
        summands[torch.from_numpy(ids)] = torch.from_numpy(values)
        assert torch.allclose(logits[0] + summands, expected, atol=1e-4)


def test_only_processors_that_read_ids_keep_a_request_from_running_ahead() -> None:
    shaping_options = dataclasses.replace(
        GREEDY, repetition_penalty=1.1, logit_bias=((1, 1.0),), allowed_token_ids=array("q", [1])
    )
    assert processors.may_run_ahead(GREEDY)
    assert processors.may_run_ahead(shaping_options)
