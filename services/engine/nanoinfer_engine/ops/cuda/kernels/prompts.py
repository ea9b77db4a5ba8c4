"""Prompt attention over the paged cache: many new tokens per row, causal, any past, one launch.

A program takes a tile of a row's new tokens and one head and walks the row's blocks from the first
position seen to its own ("FlashAttention-2", arXiv:2307.08691). Keys and values come from the
cache, where they were written before, so a chunk of a prompt sees its past without a copy of it.
Tiles that see most begin first: the longest work of a causal prompt is its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.heads import softmax_scores
from nanoinfer_engine.ops.cuda.kernels.launch import power_of_two

QUERY_TILE = 128
"""New tokens of a program."""


@dataclass(frozen=True)
class PromptShape:
    """Positions of a tile of keys, warps and stages of a program."""

    key_tile: int
    num_warps: int
    num_stages: int


def query_tiles(lengths: NDArray[np.int64], contexts: NDArray[np.int64]) -> NDArray[np.int32]:
    """[tiles, 2]: row and first new token of each tile, those that see most keys first."""
    counts = -(-lengths // QUERY_TILE)
    rows = np.repeat(np.arange(len(lengths)), counts)
    firsts = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * QUERY_TILE
    seen = (contexts - lengths)[rows] + firsts
    return np.stack([rows, firsts], axis=1)[np.argsort(-seen, kind="stable")].astype(np.int32)


@triton.jit
def _walk(
    q, queries, keys, values, slot_stride, kv_head, table, begin, end, dims, factor, top, total,
    acc, MASKED: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax, in base 2, over positions from `begin` to `end`; `queries` are positions."""
    for start in range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=positions < end, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        places = (slots * slot_stride + kv_head * DIM)[:, None] + dims[None, :]
        if MASKED:
            inside = (positions < end)[:, None]
            if DIM < DIM_PAD:
                inside = inside & (dims[None, :] < DIM)
            k = tl.load(keys + places, mask=inside, other=0.0).to(q.dtype)
        elif DIM < DIM_PAD:
            k = tl.load(keys + places, mask=dims[None, :] < DIM, other=0.0).to(q.dtype)
        else:
            k = tl.load(keys + places).to(q.dtype)
        scores = softmax_scores(tl.dot(q, tl.trans(k)), factor, SOFTCAP)
        if MASKED:
            seen = positions[None, :] <= queries[:, None]
            if WINDOW > 0:
                seen = seen & (positions[None, :] > queries[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = higher
        if MASKED:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        if MASKED:
            v = tl.load(values + places, mask=inside, other=0.0).to(q.dtype)
        elif DIM < DIM_PAD:
            v = tl.load(values + places, mask=dims[None, :] < DIM, other=0.0).to(q.dtype)
        else:
            v = tl.load(values + places).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc)
        top = higher
    return top, total, acc


@triton.jit
def _prompt_kernel(
    query, query_stride, keys, values, slot_stride, tables, table_stride, tiles, query_starts,
    contexts, output, output_stride, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.load(tiles + 2 * tl.program_id(1))
    first = tl.load(tiles + 2 * tl.program_id(1) + 1)
    start = tl.load(query_starts + row)
    length = tl.load(query_starts + row + 1) - start
    past = tl.load(contexts + row) - length
    dims = tl.arange(0, DIM_PAD)
    members = first + tl.arange(0, QUERIES)
    inside = (members < length)[:, None] & (dims < DIM)[None, :]
    tokens = (start + members).to(tl.int64)[:, None]
    q = tl.load(query + tokens * query_stride + head * DIM + dims[None, :], mask=inside, other=0.0)
    queries = past + members
    table = tables + row.to(tl.int64) * table_stride
    kv_head = head // GROUP
    # log2(e): the softmax is computed in base 2
    factor = scale * 1.4426950408889634
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM_PAD], tl.float32)
    end = tl.minimum(past + first + QUERIES, past + length)
    # positions that every query of the tile sees need no mask
    whole = (past + first + 1) // TILE * TILE
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(past + first - WINDOW + 1, 0) // TILE * TILE
        whole = begin
    else:
        top, total, acc = _walk(
            q, queries, keys, values, slot_stride, kv_head, table, begin, whole, dims, factor,
            top, total, acc, False, WINDOW, DIM, DIM_PAD, BLOCK_SIZE, TILE, SOFTCAP,
        )  # fmt: skip
    top, total, acc = _walk(
        q, queries, keys, values, slot_stride, kv_head, table, whole, end, dims, factor,
        top, total, acc, True, WINDOW, DIM, DIM_PAD, BLOCK_SIZE, TILE, SOFTCAP,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # queries past the row's end may have seen nothing
    target = output + tokens * output_stride + head * DIM + dims[None, :]
    tl.store(target, (acc / total[:, None]).to(output.dtype.element_ty), mask=inside)


def prompt_attention(
    query: Tensor,
    cache: tuple[Tensor, Tensor],
    tables: Tensor,
    tiles: Tensor,
    query_starts: Tensor,
    contexts: Tensor,
    window: int | None,
    output: Tensor,
    shape: PromptShape,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Each new token attends to its row's positions up to its own; returns `output`.

    `query` and `output` are [tokens, heads, dim], heads side by side; `cache` keys and values
    [blocks, block size, kv heads, dim] with the new ones in them; `tables` [rows, any] and
    `tiles` [tiles, 2] int32; `query_starts` [rows + 1] and `contexts` [rows], new tokens counted.
    `scale` None is 1/sqrt(dim); `softcap` is as in `AttentionLayer`.
    """
    _, num_heads, dim = query.shape
    _, block_size, kv_heads, _ = cache[0].shape
    _prompt_kernel[(num_heads, len(tiles))](
        query, query.stride(0), *cache, cache[0].stride(1), tables, tables.stride(0), tiles,
        query_starts, contexts, output, output.stride(0),
        dim**-0.5 if scale is None else scale,
        GROUP=num_heads // kv_heads, DIM=dim, DIM_PAD=power_of_two(dim), BLOCK_SIZE=block_size,
        WINDOW=window or 0, QUERIES=QUERY_TILE, TILE=shape.key_tile, SOFTCAP=softcap or 0.0,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return output
