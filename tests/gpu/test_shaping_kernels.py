"""Shaped rows on the device against the host: the same ids, and the same counts afterwards."""

from __future__ import annotations

import dataclasses
import random
from array import array

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.request import SampledToken, SamplingOptions, TokenCounts
from nanoinfer_engine.sampling.sampler import sample

from tests.gpu.test_sampling_kernels import device_sampling, sampling

device_shaping = pytest.importorskip("nanoinfer_engine.sampling.device_shaping")

pytestmark = pytest.mark.gpu

GREEDY = SamplingOptions(0.0, 0, 1.0, 0.0, 0)
SHAPES: list[dict[str, object]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "frequency_penalty": 0.1},
    {"frequency_penalty": 0.9, "presence_penalty": -0.3},
    {"presence_penalty": 1.5},
    {"bias": 2.0},
    {"allowed": 40},
    {"masked": True},
    {"ngram": 1},
    {"repetition_penalty": 1.1, "presence_penalty": 0.1, "bias": -3.0, "allowed": 300},
    {},
]
CHOICES: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 30},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 60, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 1},
]


def make_row(number: int, vocab_size: int, shape: dict[str, object], **choice: object) -> BatchRow:
    """A row whose prompt, completion and listed ids come from its number."""
    source = random.Random(number)
    ids = [source.randrange(vocab_size) for _ in range(vocab_size // 4)]
    options = dict(shape)
    bias, allowed, masked, ngram = (
        options.pop(name, None) for name in ("bias", "allowed", "masked", "ngram")
    )
    if bias is not None:
        options["logit_bias"] = tuple((each, bias) for each in dict.fromkeys(ids[:50]))
    if allowed is not None:
        options["allowed_token_ids"] = array("q", ids[:allowed])  # type: ignore[misc]
    if ngram is not None:
        options["extensions"] = (("no_repeat_ngram_size", ngram),)
    sampling_options = dataclasses.replace(GREEDY, seed=number, **options, **choice)  # type: ignore[arg-type]
    counts = None
    if sampling_options.has_penalties:
        counts = TokenCounts(ids)
        for each in ids[: vocab_size // 16] * 2 + ids[-30:]:
            counts.add(each)
    held_back = frozenset(ids[:100]) if masked else frozenset()
    row = BatchRow(
        (0,), number, (0,), True, sampling_options, held_back, counts, request_number=number
    )
    return row._replace(known_token_ids=tuple((ids * 2)[: number + 1]) if ngram else ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [700, 5003, 8192, 151936])
def test_shaped_rows_choose_as_on_the_host(
    vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and (vocab_size > 5003 or dtype is torch.bfloat16):
        pytest.skip("too slow in the interpreter")
    pairs = [(shape, choice) for shape in SHAPES for choice in CHOICES]
    repeats = 3 if device.type == "cuda" else 1
    rows = [
        make_row(number, vocab_size, shape, **choice)
        for number, (shape, choice) in enumerate(pairs * repeats)
    ]
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(len(rows), vocab_size, generator=generator) * 2.5).to(dtype)
    expected = [each.token_id for each in sample(logits, rows) if isinstance(each, SampledToken)]
    workspace = sampling.SamplingWorkspace(len(rows), vocab_size, device)
    sampled = torch.full((len(rows),), -7, dtype=torch.int32, device=device)
    table = device_shaping.ShapingSlots(workspace.counts, workspace.bias)
    slots, failed = table.place(rows, {}, sampled)
    assert not failed
    assert len(slots) == len(rows) * 9 // 10
    on_device = logits.to(device)
    sampling.choose(on_device, device_sampling(rows, device, slots), workspace, sampled)
    assert torch.equal(on_device.cpu(), logits)
    ids = sampled.tolist()
    greedy = [i for i, row in enumerate(rows) if row.sampling.temperature == 0]
    assert [ids[i] for i in greedy] == [expected[i] for i in greedy]
    different = sum(a != b for a, b in zip(ids, expected, strict=True))
    assert different <= max(len(rows) // 50, 1), different
    for index, row in enumerate(rows):
        if row.token_counts is not None:
            assert_counts(workspace.counts[slots[index]], row.token_counts, ids[index])


def assert_counts(table: torch.Tensor, counts: TokenCounts, token_id: int) -> None:
    """The table holds `counts` and one more of `token_id`."""
    expected = torch.zeros(len(table), dtype=torch.int32)
    occurred = torch.zeros(len(table), dtype=torch.bool)
    ids = torch.tensor(list(counts.token_ids))
    expected[ids] = torch.tensor(list(counts.counts), dtype=torch.int32)
    expected[token_id] += 1
    occurred[ids] = True
    occurred[token_id] = True
    assert torch.equal(table.cpu() >> 1, expected)
    assert torch.equal(table.cpu() > 0, occurred)


def test_a_small_penalty_is_not_lost_in_half_precision(device: torch.device) -> None:
    logits = torch.full((2, 700), -5.0).to(torch.bfloat16)
    logits[:, 5], logits[:, 9] = 24.0, 24.0
    counts = TokenCounts([5])
    counts.add(5)
    options = dataclasses.replace(GREEDY, presence_penalty=0.01)
    rows = [
        BatchRow((0,), 3, (0,), True, options, token_counts=counts, request_number=1),
        BatchRow((0,), 3, (0,), True, GREEDY),
    ]
    workspace = sampling.SamplingWorkspace(2, 700, device)
    sampled = torch.zeros(2, dtype=torch.int32, device=device)
    slots, _ = device_shaping.ShapingSlots(workspace.counts, workspace.bias).place(
        rows, {}, sampled
    )
    sampling.choose(logits.to(device), device_sampling(rows, device, slots), workspace, sampled)
    assert sampled.tolist() == [9, 5]


def test_rows_with_nothing_left_are_marked_alone(device: torch.device) -> None:
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(1)).half()
    logits[2, 600] = float("nan")
    nothing = dataclasses.replace(GREEDY, temperature=1.0, allowed_token_ids=array("q", []))
    removed = frozenset({600})  # a NaN that is removed does no harm
    rows = [
        BatchRow((0,), 3, (0,), True, nothing, request_number=1),
        BatchRow((0,), 3, (0,), True, GREEDY, frozenset({3}), request_number=2),
        BatchRow((0,), 3, (0,), True, GREEDY, removed, request_number=3),
        BatchRow((0,), 3, (0,), True, GREEDY),
    ]
    workspace = sampling.SamplingWorkspace(4, 700, device)
    sampled = torch.zeros(4, dtype=torch.int32, device=device)
    slots, _ = device_shaping.ShapingSlots(workspace.counts, workspace.bias).place(
        rows, {}, sampled
    )
    sampling.choose(logits.to(device), device_sampling(rows, device, slots), workspace, sampled)
    expected = [each.token_id for each in sample(logits[1:], rows[1:])]  # type: ignore[union-attr]
    assert sampled.tolist() == [-1, *expected]
    assert not workspace.counts[slots[0]].any()
