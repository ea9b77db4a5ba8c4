"""One row's draw on the device: what top-k, top-p and min-p leave, then one id of it.

Each filter is a threshold, found exactly by halving an order-preserving integer: 16 times for
half-precision logits, 32 times for float32, each a count over the row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _key(x):
    """Order-preserving int32: 0 to 65,535 of half-precision values, anything of float32."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        key = tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)
    return key


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
    logits,
    wanted,
    least,
    top,
    t,
    COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    SLICE: tl.constexpr,
    BITS: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """The largest key at and above which the ids' number or weight reaches `wanted`."""
    one = tl.full([], 1, tl.int32)
    found = tl.full([], 0, tl.int32)  # the key's distance from the lowest, bit by bit
    for step in range(BITS):
        trial = found | (one << (BITS - 1 - step))
        if _mass(logits, trial ^ LOWEST, least, top, t, COUNT, VOCAB, SLICE) >= wanted:
            found = trial
    return found ^ LOWEST


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
def _find(
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


@triton.jit
def draw(
    logits,
    slice_weights,
    k,
    p,
    share,
    number,
    top,
    t,
    VOCAB: tl.constexpr,
    SLICES_PAD: tl.constexpr,
    SLICE: tl.constexpr,
):
    """The id drawn from what top-k, top-p and min-p leave of one row's logits."""
    WIDE: tl.constexpr = logits.dtype.element_ty == tl.float32
    BITS: tl.constexpr = 32 if WIDE else 16
    LOWEST: tl.constexpr = -0x80000000 if WIDE else 0
    least = tl.full([], LOWEST, tl.int32)
    if (k > 0) & (k < VOCAB):
        wanted = k.to(tl.float32)
        least = _largest_key(logits, wanted, least, top, t, True, VOCAB, SLICE, BITS, LOWEST)
    if p < 1:
        wanted = p * _mass(logits, LOWEST, least, top, t, False, VOCAB, SLICE)
        key = _largest_key(logits, wanted, least, top, t, False, VOCAB, SLICE, BITS, LOWEST)
        least = tl.maximum(least, key)
    floor = float("-inf")
    if share > 0:
        floor = top + t * tl.log(share)
    if (least > LOWEST) | (share > 0):
        slice_weights = _slice_weights(logits, least, floor, top, t, VOCAB, SLICES_PAD, SLICE)
    return _find(logits, slice_weights, number, least, floor, top, t, VOCAB, SLICES_PAD, SLICE)
