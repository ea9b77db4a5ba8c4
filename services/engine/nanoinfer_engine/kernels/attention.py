"""Decode attention over the paged cache: head norms, rotation, cache write and softmax in one kernel.

A row's context is split over programs ("Flash-Decoding", 2023); the last program of a row and KV
head to finish adds the parts up, so no second launch is needed. The query heads that share a KV
head stand as the rows of one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.kernels.launch import pdl_options, power_of_two

MAX_PROGRAMS = 4096
MAX_SPLITS = 32


@dataclass(frozen=True)
class HeadTransform:
    """What happens to queries and keys before they meet; None where it does not.

    `rotary` is [positions, 2, 1, head dim] as the decoder keeps it; gains are [head dim].
    """

    rotary: Tensor | None = None
    query_gain: Tensor | None = None
    key_gain: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class AttentionShape:
    """Tile of positions, warps and stages of a program, and how many programs a step may split into.

    With `prefetch` a program loads its first tile before it waits for its predecessor: good for few
    rows, but the registers it takes cost bandwidth where there are many.
    """

    tile: int
    num_warps: int
    num_stages: int
    prefetch: bool
    num_programs: int


class DecodeWorkspace:
    """Memory in which the programs of one row meet; reused by every layer of a step."""

    def __init__(self, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int,
                 device: torch.device) -> None:
        """Room for `max_rows` rows at any split."""
        most = max(max_rows, MAX_PROGRAMS // num_kv_heads, MAX_SPLITS) * num_heads
        self.parts = torch.empty((most, head_dim), dtype=torch.float32, device=device)
        self.maxima = torch.empty(most, dtype=torch.float32, device=device)
        self.sums = torch.empty(most, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)


def num_splits(num_rows: int, num_kv_heads: int, num_programs: int) -> int:
    """Programs that a row's context is split over."""
    return max(min(num_programs // (num_rows * num_kv_heads), MAX_SPLITS), 1)


@triton.jit
def _transformed(pointer, rows, row_stride, columns, mask, gain, rotary, position, eps,
                 DIM: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr):
    """[rows, DIM] heads at `pointer`, normalised and rotated, in float32."""
    swapped = (columns + DIM // 2) % DIM
    x = tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        g = tl.load(gain + columns, mask=columns < DIM, other=0.0).to(tl.float32)
        x = x * scale[:, None] * g[None, :]
    if ROTARY:
        y = tl.load(pointer + rows[:, None] * row_stride + swapped[None, :], mask=mask, other=0.0)
        y = y.to(tl.float32)
        if NORM:
            h = tl.load(gain + swapped, mask=columns < DIM, other=0.0).to(tl.float32)
            y = y * scale[:, None] * h[None, :]
        angles = rotary + position.to(tl.int64) * (2 * DIM) + columns
        cos = tl.load(angles, mask=columns < DIM, other=0.0).to(tl.float32)
        sin = tl.load(angles + DIM, mask=columns < DIM, other=0.0).to(tl.float32)
        x = x * cos[None, :] + y * sin[None, :]
    return x


@triton.jit
def _tile(keys, values, slot_stride, table, kv_head, start, end, dims,
          DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Cached keys and values [TILE, dims] of positions from `start`, and which lie before `end`."""
    positions = start + tl.arange(0, TILE)
    seen = positions < end
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=seen, other=0)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    places = (slots * slot_stride + kv_head * DIM)[:, None] + dims[None, :]
    inside = seen[:, None] & (dims[None, :] < DIM)
    k = tl.load(keys + places, mask=inside, other=0.0)
    v = tl.load(values + places, mask=inside, other=0.0)
    return k, v, seen


@triton.jit
def _attend(q, k, v, seen, factor, top, total, acc):
    """One tile of the online softmax (arXiv:2205.14135), in base 2.

    A tile with nothing to see leaves everything as it was, also while `top` is still -inf.
    """
    scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * factor, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return higher, total, acc


@triton.jit
def _decode_kernel(
    query, key, value, input_stride, keys, values, slot_stride, tables, table_stride, contexts,
    rotary, query_gain, key_gain, output, parts, maxima, sums, arrived, eps, scale, num_splits,
    WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, MOST: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    context = tl.load(contexts + row)
    last = context - 1  # the new token: it comes from registers, not from the cache
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(last - first, num_splits), TILE) * TILE
    needed = tl.maximum(tl.cdiv(last - first, tl.maximum(share, 1)), 1)
    begin = first + split * share
    end = tl.minimum(begin + share, last)
    dims = tl.arange(0, DIM_PAD)
    table = tables + row.to(tl.int64) * table_stride
    if PREFETCH:
        # earlier steps wrote this part of the cache: no need to wait for it
        k, v, seen = _tile(keys, values, slot_stride, table, kv_head, begin, end, dims,
                           DIM, BLOCK_SIZE, TILE)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (split >= needed) | (context <= 0):
        return

    heads = tl.arange(0, GROUP_PAD)
    inside = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    dtype = keys.dtype.element_ty
    query_heads = query + row.to(tl.int64) * input_stride + kv_head * GROUP * DIM
    q = _transformed(query_heads, heads, DIM, dims, inside, query_gain, rotary, last, eps,
                     DIM, NORM, ROTARY)
    q = q.to(dtype)
    factor = scale * 1.4426950408889634  # log2(e): the softmax is computed in base 2
    if split == 0:
        source = row.to(tl.int64) * input_stride + kv_head * DIM
        one = tl.arange(0, 1)
        k_new = _transformed(key + source, one, DIM, dims, (one[:, None] < 1) & (dims[None, :] < DIM),
                             key_gain, rotary, last, eps, DIM, NORM, ROTARY).to(dtype)
        v_new = tl.load(value + source + dims, mask=dims < DIM, other=0.0)
        block = tl.load(table + last // BLOCK_SIZE)
        slot = block.to(tl.int64) * BLOCK_SIZE + last % BLOCK_SIZE
        target = slot * slot_stride + kv_head * DIM + dims
        tl.store(keys + target[None, :], k_new, mask=dims[None, :] < DIM)
        tl.store(values + target, v_new, mask=dims < DIM)
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * factor
        total = tl.full([GROUP_PAD], 1.0, tl.float32)
        acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32) + v_new.to(tl.float32)[None, :]
    else:
        top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)

    if PREFETCH:
        top, total, acc = _attend(q, k, v, seen, factor, top, total, acc)
        begin += TILE
    for start in range(begin, end, TILE):
        k, v, seen = _tile(keys, values, slot_stride, table, kv_head, start, end, dims,
                           DIM, BLOCK_SIZE, TILE)
        top, total, acc = _attend(q, k, v, seen, factor, top, total, acc)

    head = kv_head * GROUP + heads
    target = (row * KV_HEADS * GROUP + head).to(tl.int64)
    result = output + target[:, None] * DIM + dims[None, :]
    if not SPLIT:
        tl.store(result, (acc / total[:, None]).to(dtype), mask=inside)
    elif needed == 1:
        tl.store(result, (acc / total[:, None]).to(dtype), mask=inside)
    else:
        part = target * num_splits + split
        tl.store(parts + part[:, None] * DIM + dims[None, :], acc, mask=inside)
        tl.store(maxima + part, top, mask=heads < GROUP)
        tl.store(sums + part, total, mask=heads < GROUP)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + row * KV_HEADS + kv_head, 1, sem="acq_rel")
        if before == needed - 1:
            tl.debug_barrier()
            _add_up(output, parts, maxima, sums, (row * KV_HEADS + kv_head) * GROUP, num_splits,
                    needed, dims, GROUP, DIM, MOST)
            tl.store(arrived + row * KV_HEADS + kv_head, 0)


@triton.jit
def _add_up(output, parts, maxima, sums, first_head, num_splits, needed, dims,
            GROUP: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr):
    """Combine the first `needed` parts of each of GROUP heads into `output`."""
    base = first_head.to(tl.int64)
    splits = tl.arange(0, MOST)
    here = splits < needed
    for member in tl.static_range(GROUP):
        part = (base + member) * num_splits + splits
        top = tl.load(maxima + part, mask=here, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(sums + part, mask=here, other=0.0, cache_modifier=".cg")
        acc = tl.load(parts + part[:, None] * DIM + dims[None, :],
                      mask=here[:, None] & (dims[None, :] < DIM), other=0.0, cache_modifier=".cg")
        weight = tl.exp2(top - tl.max(top, axis=0))
        value = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
        tl.store(output + (base + member) * DIM + dims, value.to(output.dtype.element_ty),
                 mask=dims < DIM)


def decode_attention(
    heads: tuple[Tensor, Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    tables: Tensor,
    contexts: Tensor,
    transform: HeadTransform,
    window: int | None,
    workspace: DecodeWorkspace,
    output: Tensor,
    shape: AttentionShape,
    *,
    pdl: bool = False,
) -> Tensor:
    """One new token per row attends to its context and joins the cache; returns `output`.

    `heads` are query [rows, heads, dim], key and value [rows, kv heads, dim], all with the same
    row stride; `cache` keys and values [blocks, block size, kv heads, dim]; `tables` [rows, any];
    `contexts` [rows] with the new token counted, 0 for a row that is padding (left unwritten);
    `output` [rows, heads, dim], contiguous.
    """
    query, key, value = heads
    num_rows, num_heads, dim = query.shape
    _, block_size, kv_heads, _ = cache[0].shape
    group, splits = num_heads // kv_heads, num_splits(num_rows, kv_heads, shape.num_programs)
    unused = query  # a pointer that the kernel never follows
    _decode_kernel[(num_rows, kv_heads, splits)](
        query, key, value, query.stride(0), *cache, cache[0].stride(1), tables, tables.stride(0),
        contexts,
        unused if transform.rotary is None else transform.rotary,
        unused if transform.query_gain is None else transform.query_gain,
        unused if transform.key_gain is None else transform.key_gain,
        output, workspace.parts, workspace.maxima, workspace.sums, workspace.arrived,
        transform.eps, dim**-0.5, splits,
        WINDOW=window or 0, KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(power_of_two(group), 16),
        DIM=dim, DIM_PAD=power_of_two(dim), BLOCK_SIZE=block_size,
        TILE=shape.tile if dim <= 128 else min(shape.tile, 32), SPLIT=splits > 1, MOST=MAX_SPLITS,
        NORM=transform.query_gain is not None, ROTARY=transform.rotary is not None,
        PREFETCH=shape.prefetch, num_warps=shape.num_warps, num_stages=shape.num_stages,
        **pdl_options(pdl),
    )
    return output


@triton.jit
def _rotate_write_kernel(
    query, key, value, input_stride, keys, values, slot_stride, slots, positions, rotary,
    query_gain, key_gain, query_out, key_out, eps,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, KV_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    position = tl.load(positions + token)
    heads = tl.arange(0, HEADS_PAD)
    inside = (heads[:, None] < HEADS) & (dims[None, :] < DIM)
    q = _transformed(query + token * input_stride, heads, DIM, dims, inside, query_gain, rotary,
                     position, eps, DIM, NORM, ROTARY)
    tl.store(query_out + (token * HEADS + heads[:, None]) * DIM + dims[None, :],
             q.to(query_out.dtype.element_ty), mask=inside)
    heads = tl.arange(0, KV_PAD)
    inside = (heads[:, None] < KV_HEADS) & (dims[None, :] < DIM)
    k = _transformed(key + token * input_stride, heads, DIM, dims, inside, key_gain, rotary,
                     position, eps, DIM, NORM, ROTARY).to(keys.dtype.element_ty)
    places = heads[:, None] * DIM + dims[None, :]
    v = tl.load(value + token * input_stride + places, mask=inside, other=0.0)
    target = tl.load(slots + token).to(tl.int64) * slot_stride
    tl.store(key_out + token * KV_HEADS * DIM + places, k, mask=inside)
    tl.store(keys + target + places, k, mask=inside)
    tl.store(values + target + places, v, mask=inside)


def rotate_and_write(
    heads: tuple[Tensor, Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
    positions: Tensor,
    transform: HeadTransform,
) -> tuple[Tensor, Tensor]:
    """Transformed copies of query and key; key and value also go to `slots` of the cache.

    Shapes as in `decode_attention`, with tokens in the place of rows; one kernel, no workspace.
    """
    query, key, value = heads
    tokens, num_heads, dim = query.shape
    kv_heads = key.shape[1]
    query_out = torch.empty((tokens, num_heads, dim), dtype=query.dtype, device=query.device)
    key_out = torch.empty((tokens, kv_heads, dim), dtype=query.dtype, device=query.device)
    unused = query
    _rotate_write_kernel[(tokens,)](
        query, key, value, query.stride(0), *cache, cache[0].stride(1), slots, positions,
        unused if transform.rotary is None else transform.rotary,
        unused if transform.query_gain is None else transform.query_gain,
        unused if transform.key_gain is None else transform.key_gain,
        query_out, key_out, transform.eps,
        HEADS=num_heads, HEADS_PAD=power_of_two(num_heads), KV_HEADS=kv_heads,
        KV_PAD=power_of_two(kv_heads), DIM=dim, DIM_PAD=power_of_two(dim),
        NORM=transform.query_gain is not None, ROTARY=transform.rotary is not None,
        num_warps=4,
    )
    return query_out, key_out
