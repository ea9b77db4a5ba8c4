"""Token choice on the device, with the same distribution as `sampler`: no sort, no host.

One pass over the logits in slices finds each slice's best id and its share of the softmax; a
second kernel, one program a row, picks. Half-precision logits have at most 65,536 values, so the
thresholds of top-k and top-p come exactly from 16 halvings of an order-preserving integer, each a
count over the row. The drawn id is where the cumulative distribution, in id order, passes the
row's uniform number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.kernels.launch import ceil_div, pdl_options, power_of_two

_SLICE = 4096


@dataclass(frozen=True)
class DeviceSampling:
    """How each row chooses, all [rows] float32 but `top_k` int32; temperature 0 is greedy."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


class SamplingWorkspace:
    """The slices' results, for rows of `vocab_size` logits."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        """Room for `max_rows` rows."""
        shape = (max_rows, ceil_div(vocab_size, _SLICE))
        self.best = torch.empty(shape, dtype=torch.float32, device=device)
        self.best_ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.weights = torch.empty(shape, dtype=torch.float32, device=device)


@triton.jit
def _slices_kernel(
    logits,
    temperature,
    best,
    best_ids,
    weights,
    VOCAB: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ids = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(logits + row.to(tl.int64) * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
    x = x.to(tl.float32)
    # a maximum may pass over NaN; a NaN must end its row
    top = tl.where(tl.sum((x != x).to(tl.int32), axis=0) > 0, float("nan"), tl.max(x, axis=0))
    place = row * SLICES + part
    tl.store(best + place, top)
    tl.store(best_ids + place, part * SLICE + tl.argmax(x, axis=0))
    t = tl.load(temperature + row)
    if t > 0:
        tl.store(weights + place, tl.sum(tl.exp((x - top) / t), axis=0))


@triton.jit
def _key(x):
    """Order-preserving integer of half-precision values, 0 to 65,535."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


@triton.jit
def _mass(
    logits, threshold, least, top, t, COUNT: tl.constexpr, VOCAB: tl.constexpr, SLICE: tl.constexpr
):
    """Number, or softmax weight, of the ids whose key is at least `threshold` and `least`."""
    total = tl.zeros([SLICE], tl.float32)
    for start in range(0, VOCAB, SLICE):
        ids = start + tl.arange(0, SLICE)
        x = tl.load(logits + ids, mask=ids < VOCAB, other=float("-inf"))
        chosen = (_key(x) >= threshold) & (_key(x) >= least) & (ids < VOCAB)
        weight = tl.full([SLICE], 1.0, tl.float32)
        if not COUNT:
            weight = tl.exp((x.to(tl.float32) - top) / t)
        total += tl.where(chosen, weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _largest_key(
    logits, wanted, least, top, t, COUNT: tl.constexpr, VOCAB: tl.constexpr, SLICE: tl.constexpr
):
    """The largest key at and above which the ids' number or weight reaches `wanted`."""
    key = 0
    for step in range(16):
        trial = key + (32768 >> step)
        if _mass(logits, trial, least, top, t, COUNT, VOCAB, SLICE) >= wanted:
            key = trial
    return key


@triton.jit
def _choose_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    best,
    best_ids,
    weights,
    sampled,
    VOCAB: tl.constexpr,
    SLICES: tl.constexpr,
    SLICES_PAD: tl.constexpr,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    share = tl.load(min_p + row)
    number = tl.load(uniform + row)
    if PDL:
        tl.extra.cuda.gdc_wait()
    parts = tl.arange(0, SLICES_PAD)
    tops = tl.load(best + row * SLICES + parts, mask=parts < SLICES, other=float("-inf"))
    bad = tl.sum((tops != tops).to(tl.int32), axis=0) > 0
    top = tl.max(tops, axis=0)
    winner = tl.argmax(tops, axis=0)
    token = tl.load(best_ids + row * SLICES + winner)
    bad = bad | (top == float("inf")) | (top == float("-inf"))
    if (t > 0) & (k != 1) & (bad == 0):
        own = logits + row.to(tl.int64) * VOCAB
        here = tl.load(weights + row * SLICES + parts, mask=parts < SLICES, other=0.0)
        scales = tl.where(parts < SLICES, tl.exp((tops - top) / t), 0.0)
        slice_weights = tl.where(tops == float("-inf"), 0.0, here * scales)
        least = 0
        if (k > 0) & (k < VOCAB):
            least = _largest_key(own, k.to(tl.float32), 0, top, t, True, VOCAB, SLICE)
        if p < 1:
            total = _mass(own, 0, least, top, t, False, VOCAB, SLICE)
            crossing = _largest_key(own, total * p, least, top, t, False, VOCAB, SLICE)
            least = tl.maximum(least, crossing)
        floor = float("-inf")
        if share > 0:
            floor = top + t * tl.log(share)
        if (least > 0) | (share > 0):
            slice_weights = _slice_weights(own, least, floor, top, t, VOCAB, SLICES_PAD, SLICE)
        token = _draw(own, slice_weights, number, least, floor, top, t, VOCAB, SLICES_PAD, SLICE)
    tl.store(sampled + row, tl.where(bad, -1, token))


@triton.jit
def _slice_weights(
    logits, least, floor, top, t, VOCAB: tl.constexpr, SLICES_PAD: tl.constexpr, SLICE: tl.constexpr
):
    """[SLICES_PAD]: the softmax weight of what the filters leave of each slice."""
    parts = tl.arange(0, SLICES_PAD)
    weights = tl.zeros([SLICES_PAD], tl.float32)
    for start in range(0, VOCAB, SLICE):
        value = tl.sum(_weights_at(logits, start, least, floor, top, t, VOCAB, SLICE), axis=0)
        weights = tl.where(parts == start // SLICE, value, weights)
    return weights


@triton.jit
def _weights_at(logits, start, least, floor, top, t, VOCAB: tl.constexpr, SLICE: tl.constexpr):
    """[SLICE] softmax weights from id `start`, 0 where a filter drops the id."""
    ids = start + tl.arange(0, SLICE)
    x = tl.load(logits + ids, mask=ids < VOCAB, other=float("-inf"))
    kept = (_key(x) >= least) & (x.to(tl.float32) >= floor) & (ids < VOCAB)
    return tl.where(kept, tl.exp((x.to(tl.float32) - top) / t), 0.0)


@triton.jit
def _draw(
    logits,
    slice_weights,
    number,
    least,
    floor,
    top,
    t,
    VOCAB: tl.constexpr,
    SLICES_PAD: tl.constexpr,
    SLICE: tl.constexpr,
):
    """The id at which the cumulative weight, in id order, passes `number` of the total."""
    parts = tl.arange(0, SLICES_PAD)
    cumulative = tl.cumsum(slice_weights, axis=0)
    target = number * tl.max(cumulative, axis=0)
    # the last slice with any weight is the answer where rounding carries the target past the end
    last = tl.max(tl.where(slice_weights > 0, parts, 0), axis=0)
    part = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), axis=0), last)
    before = tl.sum(tl.where(parts < part, slice_weights, 0.0), axis=0)
    weights = _weights_at(logits, part * SLICE, least, floor, top, t, VOCAB, SLICE)
    inner = tl.cumsum(weights, axis=0) + before
    offsets = tl.arange(0, SLICE)
    last_inner = tl.max(tl.where(weights > 0, offsets, 0), axis=0)
    place = tl.min(tl.where((inner > target) & (weights > 0), offsets, SLICE), axis=0)
    return part * SLICE + tl.minimum(place, last_inner)


def choose(
    logits: Tensor,
    sampling: DeviceSampling,
    workspace: SamplingWorkspace,
    sampled: Tensor,
    *,
    pdl: bool = False,
) -> Tensor:
    """One id per row of half-precision `logits` into `sampled` [>= rows] int32.

    -1 where the logits are not finite. `logits` is not modified.
    """
    rows, vocab_size = logits.shape
    slices = ceil_div(vocab_size, _SLICE)
    _slices_kernel[(rows, slices)](
        logits,
        sampling.temperature,
        workspace.best,
        workspace.best_ids,
        workspace.weights,
        VOCAB=vocab_size,
        SLICES=slices,
        SLICE=_SLICE,
        num_warps=8,
        **pdl_options(pdl),
    )
    _choose_kernel[(rows,)](
        logits,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.uniform,
        workspace.best,
        workspace.best_ids,
        workspace.weights,
        sampled,
        VOCAB=vocab_size,
        SLICES=slices,
        SLICES_PAD=power_of_two(slices),
        SLICE=_SLICE,
        num_warps=16,
        **pdl_options(pdl),
    )
    return sampled
