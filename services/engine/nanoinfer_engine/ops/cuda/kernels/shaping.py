"""Logits processors on the device: `sampling.processors`, for the kernels.

A shaped row has a slot in two tables [slots, vocabulary]. `counts` holds 0 for an id that has not
occurred, 1 for one of the prompt alone, else twice how often it came in the completion, plus 1 if
the prompt has it too. `bias` holds what is added; minus infinity removes the id.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shaped(x, ids, slot, repetition, frequency, presence, counts, bias, row, VOCAB: tl.constexpr):
    """Float32 logits `x` of `ids` as the options of `row` want them, in the order of the host.

    NaN stays NaN but where its id is removed; beyond the vocabulary nothing changes.
    """
    inside = ids < VOCAB
    own = slot.to(tl.int64) * VOCAB + ids
    times = tl.load(counts + own, mask=inside, other=0)
    added = tl.load(bias + own, mask=inside, other=0.0)
    r = tl.load(repetition + row)
    penalised = tl.where(x < 0, x * r, tl.div_rn(x, tl.zeros_like(x) + r))
    came = tl.where(times > 1, tl.load(presence + row), 0.0)
    penalised -= tl.load(frequency + row) * (times >> 1).to(tl.float32) + came
    penalised = tl.where(penalised > 1e30, 1e30, penalised)
    penalised = tl.where(penalised < -1e30, -1e30, penalised)
    x = tl.where(times > 0, penalised, x)
    return tl.where(added == float("-inf"), added, x + added)


@triton.jit
def count_token(counts, slot, token, VOCAB: tl.constexpr):
    """Count one more completion token of the slot's request."""
    place = counts + slot.to(tl.int64) * VOCAB + token
    tl.store(place, tl.load(place) + 2)
