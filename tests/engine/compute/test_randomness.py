"""Draws as random numbers: over prompts, seeds and positions, for neighbours, and under noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.request import SampledToken, SamplingOptions, prompt_key
from nanoinfer_engine.sampling import randomness
from nanoinfer_engine.sampling.randomness import exponentials, row_keys
from nanoinfer_engine.sampling.sampler import sample
from scipy import stats

from tests.engine.compute.driver import generate, make_runner
from tests.engine.tiny_checkpoints import make_checkpoint

PLAIN = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
VOCAB = 64
FLAT = torch.zeros(1, VOCAB)
PROMPTS = [prompt_key((1, 2, 3 + i)) for i in range(3000)]


def row(prompt: int, seed: int = 7, position: int = 5, **options: object) -> BatchRow:
    sampling = dataclasses.replace(PLAIN, seed=seed, **options)  # type: ignore[arg-type]
    return BatchRow((0,), position - 1, (0,), True, sampling, prompt_key=prompt)


def draw(logits: torch.Tensor, rows: Iterable[BatchRow]) -> np.ndarray:
    """An id for each row; `logits` are the same for all, or each row's own."""
    rows = list(rows)
    values = logits.expand(len(rows), -1)
    count = max(2**19 // values.shape[1], 1)  # at once: large ones take their time for memory
    results = []
    for first in range(0, len(rows), count):
        results += sample(values[first : first + count], rows[first : first + count])
    return np.array([each.token_id for each in results if isinstance(each, SampledToken)])


# one axis at a time, the other two held still; neighbours along each are as close as can be
AXES: dict[str, Callable[[int], BatchRow]] = {
    "prompts": lambda i: row(PROMPTS[i]),
    "keys of prompts that differ by 1": lambda i: row(i),
    "seeds": lambda i: row(PROMPTS[0], seed=i),
    "great seeds": lambda i: row(PROMPTS[0], seed=2**64 - 1 - i),
    "positions": lambda i: row(PROMPTS[0], position=1 + i),
    "late positions": lambda i: row(PROMPTS[0], position=100_000 + i),
    "seed and position together": lambda i: row(PROMPTS[0], seed=i, position=1 + i),
}


@pytest.mark.parametrize("axis", AXES)
def test_ids_are_drawn_evenly_along_each_axis_and_neighbours_are_independent(axis: str) -> None:
    ids = draw(FLAT, map(AXES[axis], range(3000)))
    assert len(ids) == 3000
    assert stats.chisquare(np.bincount(ids, minlength=VOCAB)).pvalue > 1e-3
    for distance in (1, 2, 16):
        pairs = np.zeros((8, 8))
        np.add.at(pairs, (ids[:-distance] // 8, ids[distance:] // 8), 1)
        assert stats.chi2_contingency(pairs).pvalue > 1e-3
        same = int((ids[:-distance] == ids[distance:]).sum())
        assert stats.binomtest(same, len(ids) - distance, 1 / VOCAB).pvalue > 1e-3


def test_one_seed_draws_as_widely_over_prompts_as_over_seeds() -> None:
    """48 prompts of one seed at each of 40 positions: the deviation of ids is that of chance."""
    expected = np.sqrt((VOCAB**2 - 1) / 12)
    deviations = []
    counts = np.zeros(VOCAB)
    for position in range(1, 41):
        ids = draw(FLAT, (row(key, position=position) for key in PROMPTS[:48]))
        deviations.append(ids.std(ddof=1))
        counts += np.bincount(ids, minlength=VOCAB)
    assert np.mean(deviations) == pytest.approx(expected, rel=0.05)
    assert min(deviations) > 0.7 * expected
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("filters", [{}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_one_seed_draws_the_models_distribution_over_prompts(filters: dict[str, object]) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 1.5
    ids = draw(logits, (row(key, **filters) for key in PROMPTS))
    kept = np.unique(draw(logits, (row(key, seed=1, **filters) for key in PROMPTS * 4)))
    weights = np.exp(logits[0].double().numpy())[kept]
    counts = np.bincount(ids, minlength=VOCAB)
    assert counts.sum() == counts[kept].sum()
    expected = weights / weights.sum() * len(ids)
    common = expected >= 5
    seen = np.append(counts[kept][common], counts[kept][~common].sum())
    wanted = np.append(expected[common], expected[~common].sum() + 1e-9)
    statistic = ((seen - wanted) ** 2 / np.maximum(wanted, 1)).sum()
    assert stats.chi2.sf(statistic, len(seen) - 1) > 1e-3


def test_sixteen_completions_of_a_prompt_are_independent_of_one_another() -> None:
    """Seed + 0 … 15 of 400 prompts: each even, and each pair as often equal as chance makes it."""
    ids = np.stack([draw(FLAT, (row(k, seed=40 + i) for k in PROMPTS[:400])) for i in range(16)])
    assert stats.chisquare(np.bincount(ids.ravel(), minlength=VOCAB)).pvalue > 1e-3
    pairs = [(ids[i] == ids[j]).sum() for i in range(16) for j in range(i)]
    # 120 pairs of 400: about 750 equal ones of 48,000
    assert stats.binomtest(int(sum(pairs)), 400 * len(pairs), 1 / VOCAB).pvalue > 1e-3
    assert max(pairs) < 400 * 0.06


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.95}, {"top_k": 100}])
def test_noise_on_the_logits_seldom_changes_a_draw(filters: dict[str, object]) -> None:
    """A draw by cumulative sums changed 3.7 % of these, because every sum before an id moved."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3000, 500, generator=generator) * 2
    noisy = logits + torch.randn(logits.shape, generator=generator) * 1e-3
    rows = [row(key, seed=3, **filters) for key in PROMPTS]
    assert (draw(logits, rows) != draw(noisy, rows)).mean() < 0.01


def test_rare_ids_are_drawn_as_often_as_they_should() -> None:
    """One id has nearly all; 8,000 others share a tenth."""
    logits = torch.zeros(1, 8_001)
    logits[0, 4_000] = np.log(9 * 8_000)
    ids = draw(logits, (row(key) for key in PROMPTS[:2000]))
    rare = ids[ids != 4_000]
    assert stats.binomtest(len(rare), len(ids), 0.1).pvalue > 1e-3
    assert stats.kstest(rare / 8_001, "uniform").pvalue > 1e-3
    assert len(set(rare)) > 0.95 * len(rare)


def test_the_numbers_of_ids_are_exponential_at_both_ends() -> None:
    keys = row_keys([row(PROMPTS[i], seed=9) for i in range(20)])
    numbers = exponentials(keys[:, :, None], np.arange(150_000, dtype=np.uint32)).numpy()
    assert all(stats.kstest(each, "expon").pvalue > 1e-4 for each in numbers)
    # the smallest of 3,000,000, which decide draws, and the largest
    assert 1e-8 < numbers.min() < 5e-6
    assert 12 < numbers.max() < 17
    assert stats.kstest(numbers.min(axis=1) * 150_000, "expon").pvalue > 1e-3


def test_the_numbers_of_neighbouring_ids_and_keys_are_uncorrelated() -> None:
    rows = [row(PROMPTS[0], position=1 + i) for i in range(60)]
    numbers = exponentials(row_keys(rows)[:, :, None], np.arange(20_000, dtype=np.uint32)).numpy()
    for ours, theirs in (
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[:, 4096:], numbers[:, :-4096]),
        (numbers[1:], numbers[:-1]),
    ):
        correlation = np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(ours.size)


def test_numbers_are_finite_and_exact_at_the_ends_of_the_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = np.array([0, 1, 2**32 - 1], dtype=np.uint32)
    monkeypatch.setattr(randomness, "_hash", lambda keys, token_ids: ends.copy())
    numbers = exponentials(np.zeros((2, 3), dtype=np.uint32), ends).tolist()
    # 1.5 of 2^-32 would be lost in 1 - u
    assert numbers[:2] == pytest.approx([2.0**-33, 1.5 * 2.0**-32], rel=1e-6)
    assert numbers[2] == pytest.approx(24 * np.log(2), rel=1e-6)


def test_a_prompts_key_depends_on_every_id_and_on_their_order() -> None:
    prompts = [(), (0,), (0, 0), (1,), (1, 2), (2, 1), (12,), (1, 2, 3), (2**31 - 1,)]
    assert len({prompt_key(each) for each in prompts}) == len(prompts)
    assert prompt_key([1, 2]) == prompt_key((1, 2))
    assert all(0 <= prompt_key(each) < 2**64 for each in prompts)


def test_tokens_stay_the_same_in_company_in_chunks_and_after_preemption(tmp_path: Path) -> None:
    runner = make_runner(make_checkpoint("qwen3", tmp_path))
    source = np.random.default_rng(4)
    prompts = [tuple(source.integers(0, 90, 20 + i).tolist()) for i in range(3)]
    options = dataclasses.replace(PLAIN, temperature=1.5, top_p=0.98, seed=11)
    expected = []
    for index, prompt in enumerate(prompts):
        own = dataclasses.replace(options, seed=11 + index)
        expected += generate(runner, [prompt], 12, own)
    ids = [[token.token_id for token in tokens] for tokens in expected]
    squeezed = generate(runner, prompts, 12, options, kv_tokens=56, max_batch_tokens=17)
    assert [[token.token_id for token in tokens] for tokens in squeezed] == ids
    assert len({tuple(each) for each in ids}) == len(prompts)
