"""Token choice on the device, with the same distribution as `sampler`: no sort, no host.

One pass over the logits in slices finds each slice's best id and, where no filter is on, the id
that its noise lets win; a second kernel, one program a row, picks the row's. Behind a filter it
draws by itself, among what the filter leaves.

A row with a slot is shaped (`kernels.shaping`) into a float32 copy first and its id is counted:
half precision would swallow a small penalty. Rows without a slot pay nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.drawing import draw, race
from nanoinfer_engine.ops.cuda.kernels.launch import ceil_div, pdl_options, power_of_two
from nanoinfer_engine.ops.cuda.kernels.shaping import count_token, shaped

_SLICE, _PIECE = 4096, 512


@dataclass(frozen=True)
class DeviceSampling:
    """How each row chooses, all [rows] float32 but the first four, which are int32.

    Temperature 0 is greedy. The penalties are read where `slot` is not negative. The keys are those
    of `randomness.row_keys`.
    """

    top_k: Tensor
    slot: Tensor
    first_key: Tensor
    second_key: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True)
class History:
    """Where a step leaves its ids for the host: `ids` [entries, rows], all int32.

    `current` is the step's entry; the step sets `turn` to the next one's.
    """

    ids: Tensor
    turn: Tensor
    current: Tensor


class SamplingWorkspace:
    """The slices' results, for rows of `vocab_size` logits, and the tables of shaped rows."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        """Room for `max_rows` rows, all of them shaped: 12 bytes for each id of each row."""
        shape = (max_rows, ceil_div(vocab_size, _SLICE))
        self.best = torch.empty(shape, dtype=torch.float32, device=device)
        self.best_ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.drawn = torch.empty(shape, dtype=torch.float32, device=device)
        self.drawn_ids = torch.empty(shape, dtype=torch.int32, device=device)
        table = (max_rows, vocab_size)
        self.counts = torch.zeros(table, dtype=torch.int32, device=device)
        self.bias = torch.zeros(table, dtype=torch.float32, device=device)
        self.shaped = torch.empty(table, dtype=torch.float32, device=device)


@triton.jit
def _is_unfiltered(k, p, share, VOCAB: tl.constexpr):
    """Whether every id may be drawn."""
    return ((k <= 0) | (k >= VOCAB)) & (p >= 1) & (share <= 0)


@triton.jit
def _slices_kernel(
    logits, top_k, slots, first_key, second_key, temperature, top_p, min_p,
    repetition, frequency, presence, counts, bias, shaped_logits, best, best_ids, drawn, drawn_ids,
    VOCAB: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, PIECE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + row)
    if PDL:
        tl.extra.cuda.gdc_wait()
    ids = part * SLICE + tl.arange(0, SLICE)
    own = row.to(tl.int64) * VOCAB
    x = tl.load(logits + own + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    if slot >= 0:
        # in pieces and through memory: many registers here would leave plain rows fewer warps
        for start in range(0, SLICE, PIECE):
            some = part * SLICE + start + tl.arange(0, PIECE)
            y = tl.load(logits + own + some, mask=some < VOCAB, other=0.0).to(tl.float32)
            y = shaped(y, some, slot, repetition, frequency, presence, counts, bias, row, VOCAB)
            tl.store(shaped_logits + own + some, y, mask=some < VOCAB)
        tl.debug_barrier()
        x = tl.load(shaped_logits + own + ids, mask=ids < VOCAB, other=float("-inf"))
    # a maximum may pass over NaN; a NaN must end its row
    top = tl.where(tl.sum((x != x).to(tl.int32), axis=0) > 0, float("nan"), tl.max(x, axis=0))
    place = row * SLICES + part
    tl.store(best + place, top)
    tl.store(best_ids + place, part * SLICE + tl.argmax(x, axis=0))
    t = tl.load(temperature + row)
    k, p, share = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    if (t > 0) & _is_unfiltered(k, p, share, VOCAB):
        low, high = tl.load(first_key + row), tl.load(second_key + row)
        start = part * SLICE
        if slot >= 0:
            wide = shaped_logits + own
            won, token = race(wide, start, 0, 0, low, high, top, t, False, SLICE, VOCAB, PIECE)
        else:
            half = logits + own
            won, token = race(half, start, 0, 0, low, high, top, t, False, SLICE, VOCAB, PIECE)
        # weights are relative to the slice's best logit: comparable as logarithms
        tl.store(drawn + place, tl.log(won) + top / t)
        tl.store(drawn_ids + place, token)


@triton.jit
def _choose_kernel(
    logits, shaped_logits, counts, top_k, slots, first_key, second_key, temperature, top_p, min_p,
    best, best_ids, drawn, drawn_ids, sampled, history, turn, current, history_stride,
    VOCAB: tl.constexpr, SLICES: tl.constexpr, SLICES_PAD: tl.constexpr, SLICE: tl.constexpr,
    ENTRIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    share = tl.load(min_p + row)
    low, high = tl.load(first_key + row), tl.load(second_key + row)
    slot = tl.load(slots + row)
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
        own = row.to(tl.int64) * VOCAB
        if _is_unfiltered(k, p, share, VOCAB):
            place = drawn + row * SLICES + parts
            winner = tl.argmax(tl.load(place, mask=parts < SLICES, other=float("-inf")), axis=0)
            token = tl.load(drawn_ids + row * SLICES + winner)
        elif slot >= 0:
            token = draw(shaped_logits + own, k, p, share, low, high, top, t, VOCAB, SLICE)
        else:
            token = draw(logits + own, k, p, share, low, high, top, t, VOCAB, SLICE)
    if (slot >= 0) & (bad == 0):
        count_token(counts, slot, token, VOCAB)
    token = tl.where(bad, -1, token)
    tl.store(sampled + row, token)
    if ENTRIES > 0:
        place = tl.load(current)
        tl.store(history + place * history_stride + row, token)
        if row == 0:
            tl.store(turn, (place + 1) % ENTRIES)


def choose(
    logits: Tensor,
    sampling: DeviceSampling,
    workspace: SamplingWorkspace,
    sampled: Tensor,
    history: History | None = None,
    *,
    pdl: bool = False,
) -> Tensor:
    """One id per row of half-precision `logits` into `sampled` [>= rows] int32, and `history`.

    -1 where the logits are not finite. `logits` is not modified.
    """
    rows, vocab_size = logits.shape
    slices = ceil_div(vocab_size, _SLICE)
    keys = sampling.first_key, sampling.second_key
    filters = sampling.temperature, sampling.top_p, sampling.min_p
    options = (sampling.top_k, sampling.slot, *keys, *filters)
    results = (workspace.best, workspace.best_ids, workspace.drawn, workspace.drawn_ids)
    _slices_kernel[(rows, slices)](
        logits,
        *options,
        sampling.repetition,
        sampling.frequency,
        sampling.presence,
        workspace.counts,
        workspace.bias,
        workspace.shaped,
        *results,
        VOCAB=vocab_size,
        SLICES=slices,
        SLICE=_SLICE,
        PIECE=_PIECE,
        num_warps=8,
        maxnreg=40,
        **pdl_options(pdl),
    )
    _choose_kernel[(rows,)](
        logits,
        workspace.shaped,
        workspace.counts,
        *options,
        *results,
        sampled,
        sampled if history is None else history.ids,
        sampled if history is None else history.turn,
        sampled if history is None else history.current,
        0 if history is None else history.ids.stride(0),
        ENTRIES=0 if history is None else len(history.ids),
        VOCAB=vocab_size,
        SLICES=slices,
        SLICES_PAD=power_of_two(slices),
        SLICE=_SLICE,
        num_warps=16,
        **pdl_options(pdl),
    )
    return sampled
