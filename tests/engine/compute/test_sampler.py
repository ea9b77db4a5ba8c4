"""Sampling: distributions against exact probabilities, reproducibility, isolation, logprobs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SampledToken, SamplingOptions
from nanoinfer_engine.sampling.sampler import sample
from scipy import stats

PLAIN = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def row(position: int = 1, masked: frozenset[int] = frozenset(), **options: object) -> BatchRow:
    sampling = dataclasses.replace(PLAIN, **options)  # type: ignore[arg-type]
    return BatchRow((0,), position - 1, (0,), True, sampling, masked)


def exact_probabilities(logits: np.ndarray, row: BatchRow) -> np.ndarray:
    """The definition, spelled out: mask, temperature, top-k, top-p, min-p."""
    options = row.sampling
    scaled = logits.astype(np.float64) / options.temperature
    scaled[list(row.masked_token_ids)] = -np.inf
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled - scaled.max())
    if options.top_k:
        probabilities[order[options.top_k :]] = 0
    probabilities /= probabilities.sum()
    kept_mass = 0.0
    for token_id in order:
        if kept_mass >= options.top_p:
            probabilities[token_id] = 0
        kept_mass += probabilities[token_id]
    probabilities[probabilities < options.min_p * probabilities.max() * (1 - 1e-12)] = 0
    return probabilities / probabilities.sum()


def draw_many(logits: torch.Tensor, row: BatchRow, count: int) -> list[int]:
    """One draw at each of the positions 1 … count, 2,000 rows to a batch."""
    token_ids = []
    for first in range(1, count + 1, 2000):
        rows = [
            row._replace(start=position - 1)
            for position in range(first, min(first + 2000, count + 1))
        ]
        for result in sample(logits.expand(len(rows), -1), rows):
            assert isinstance(result, SampledToken)
            token_ids.append(result.token_id)
    return token_ids


def assert_distribution(logits: torch.Tensor, row: BatchRow, count: int) -> None:
    expected = exact_probabilities(logits.numpy(), row) * count
    seen = Counter(draw_many(logits, row, count))
    observed = np.array([seen[token_id] for token_id in range(len(expected))])
    assert observed[expected == 0].sum() == 0
    # a chi-square cell wants five expected draws: the rare ids share one
    common = expected >= 5
    cells = [observed[common], expected[common]]
    rest = expected[~common].sum()
    if rest > 0:
        cells = [np.append(cells[0], observed[~common].sum()), np.append(cells[1], rest)]
    if len(cells[0]) > 1:
        statistic = ((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1)).sum()
        assert stats.chi2.sf(statistic, len(cells[0]) - 1) > 1e-3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.7},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 8, "top_p": 0.8},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.1},
        {"masked": frozenset({3, 7})},
        {"masked": frozenset({0, 1, 2}), "top_k": 4, "top_p": 0.6},
    ],
)
def test_distribution(temperature: float, filters: dict[str, object]) -> None:
    logits = torch.randn(16, generator=torch.Generator().manual_seed(5)) * 1.5
    assert_distribution(logits, row(seed=11, temperature=temperature, **filters), 6000)


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_p": 0.9, "top_k": 600}, {"min_p": 0.3}])
def test_distribution_over_a_wide_vocabulary(filters: dict[str, object]) -> None:
    """Nearly flat: top-p holds more ids than the sampler looks at before it sorts everything."""
    logits = torch.randn(900, generator=torch.Generator().manual_seed(6)) * 0.4
    assert_distribution(logits, row(seed=12, **filters), 20_000)


def test_a_draw_depends_on_no_other_row_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 3000, generator=generator)
    kinds: list[dict[str, object]] = [
        {},
        {"top_p": 0.95},
        {"top_p": 0.3, "temperature": 0.5},
        {"top_k": 40},
        {"top_k": 700, "top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 0.0},
        {"masked": frozenset(range(100))},
        {"num_logprobs": 3},
    ]
    rows = [row(position=i, seed=i * 7, **kinds[i % len(kinds)]) for i in range(1, 65)]  # type: ignore[arg-type]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)]
    assert [t.token_id for t in together] == [t.token_id for t in alone]  # type: ignore[union-attr]
    reversed_order = sample(logits.flip(0), rows[::-1])[::-1]
    assert [t.token_id for t in together] == [t.token_id for t in reversed_order]  # type: ignore[union-attr]
    other_seeds = [
        r._replace(sampling=dataclasses.replace(r.sampling, seed=r.sampling.seed + 1)) for r in rows
    ]
    assert sample(logits, other_seeds) != together


@pytest.mark.matrix("R17")
def test_temperature_zero_and_nearly_zero_and_top_k_one_are_greedy() -> None:
    logits = torch.randn(3, 50)
    rows = [row(temperature=0.0), row(temperature=9e-6), row(temperature=2.0, top_k=1)]
    assert sample(logits, rows) == [SampledToken(int(i)) for i in logits.argmax(-1)]


@pytest.mark.matrix("R17")
def test_a_small_temperature_draws_finite() -> None:
    logits = torch.tensor([[80.0, -80.0, 79.9]])
    assert sample(logits, [row(temperature=2e-5)]) == [SampledToken(0)]


def test_masked_ids_are_never_chosen_and_greedy_takes_the_next_best() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0, 0.0]])
    assert sample(logits, [row(temperature=0.0, masked=frozenset({1}))]) == [SampledToken(2)]
    assert logits.tolist() == [[1.0, 9.0, 8.0, 0.0]]


def test_top_p_keeps_the_first_id_however_small() -> None:
    logits = torch.tensor([0.0, 5.0, 1.0])
    assert set(draw_many(logits, row(top_p=1e-6), 200)) == {1}


def test_a_failing_row_fails_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 40, generator=generator)
    rows = [row(position=i + 1, seed=i, top_p=0.9) for i in range(6)]
    expected = sample(logits, rows)
    hostile, hostile_rows = logits.clone(), list(rows)
    hostile[1, 3] = math.nan
    hostile[3] = -math.inf
    hostile[5, 0] = math.inf
    hostile_rows[2] = rows[2]._replace(masked_token_ids=frozenset({40}))
    results = sample(hostile, hostile_rows)
    for index in (1, 2, 3, 5):
        assert isinstance(results[index], SamplingError)
    assert [results[i] for i in (0, 4)] == [expected[i] for i in (0, 4)]


def test_every_id_masked_is_that_rows_error() -> None:
    results = sample(torch.zeros(2, 3), [row(masked=frozenset({0, 1, 2})), row(temperature=0.0)])
    assert isinstance(results[0], SamplingError)
    assert results[1] == SampledToken(0)


def test_logprobs_are_raw_whatever_the_sampling_options() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 30, generator=generator) * 2
    masked = frozenset({int(logits[0].argmax())})
    rows = [
        row(temperature=0.5, top_k=3, num_logprobs=4, masked=masked),
        row(temperature=2.0, num_logprobs=0),
    ]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for index, result in enumerate(sample(logits, rows)):
        assert isinstance(result, SampledToken)
        assert result.logprob is not None
        assert result.logprob.token_id == result.token_id
        own = expected[index, result.token_id].item()
        assert result.logprob.logprob == pytest.approx(own, abs=1e-5)
        assert result.logprob.rank == 1 + int((expected[index] > own + 1e-9).sum())
        order = expected[index].argsort(descending=True)
        assert len(result.top) == rows[index].sampling.num_logprobs
        for rank, each in enumerate(result.top, start=1):
            assert each.rank == rank
            assert each.token_id == order[rank - 1]
            assert each.logprob == pytest.approx(expected[index, each.token_id].item(), abs=1e-5)


def test_no_logprobs_unless_asked_and_no_more_than_the_vocabulary() -> None:
    first, second = sample(torch.zeros(2, 3), [row(), row(num_logprobs=20)])
    assert isinstance(first, SampledToken)
    assert isinstance(second, SampledToken)
    assert first.logprob is None
    assert first.top == ()
    assert [each.rank for each in second.top] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_with_ties_draw_from_all_that_tie(dtype: torch.dtype) -> None:
    logits = torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=dtype)
    seen = Counter(draw_many(logits, row(top_k=2), 3000))
    # three ids tie for the second place: all three stay, the fourth goes
    assert set(seen) == {0, 1, 2}
    assert stats.chisquare([seen[i] for i in range(3)]).pvalue > 1e-3
