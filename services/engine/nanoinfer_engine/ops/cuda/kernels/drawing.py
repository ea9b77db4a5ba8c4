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
def _weight_by_number(x, ids, first_key, second_key, top, t):
    """Softmax weight / exponential number of each id: the largest is drawn.

    The hash is that of `randomness`, bit by bit; exp and log may differ in their last bits.
    """
    h = ids.to(tl.uint32) ^ first_key.to(tl.uint32, bitcast=True)
    h ^= h >> 16
    h *= 0x21F0AAAD
    h ^= h >> 15
    h ^= second_key.to(tl.uint32, bitcast=True)
    h *= 0xD35A2D97
    h ^= h >> 15
    u = tl.minimum((h.to(tl.float32) + 0.5) * 2**-32, 1 - 2**-24)
    # The number is -log1p(-u), exact for small u: -log(rest) * u / (1 - rest), where 1 - rest is
    # what rounding has left of u.
    rest = 1 - u
    weight = tl.exp((x - top) / t) * tl.where(rest == 1, 1.0, 1 - rest)
    return weight / (u * tl.where(rest == 1, 1.0, -tl.log(rest)))


@triton.jit
def race(
    logits, start, least, floor, first_key, second_key, top, t,
    FILTERED: tl.constexpr, COUNT: tl.constexpr, VOCAB: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The largest weight / number of `COUNT` ids, and its id; `least` and `floor` drop ids.

    Each lane keeps its own best: the lanes are compared once, at the end.
    """
    lanes = tl.arange(0, PIECE)
    best = tl.zeros([PIECE], tl.float32)
    winners = tl.zeros([PIECE], tl.int32)
    for first in range(0, COUNT, PIECE):
        ids = start + first + lanes
        x = tl.load(logits + ids, mask=ids < VOCAB, other=float("-inf"))
        y = _weight_by_number(x.to(tl.float32), ids, first_key, second_key, top, t)
        wins = y > best
        if FILTERED:
            wins = wins & (_key(x) >= least) & (x.to(tl.float32) >= floor)
        best = tl.where(wins, y, best)
        winners = tl.where(wins, ids, winners)
    place = tl.argmax(best, axis=0)
    return tl.max(best, axis=0), tl.sum(tl.where(lanes == place, winners, 0), axis=0)


@triton.jit
def draw(logits, k, p, share, low, high, top, t, VOCAB: tl.constexpr, SLICE: tl.constexpr):
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
    return race(logits, 0, least, floor, low, high, top, t, True, VOCAB, VOCAB, SLICE)[1]
