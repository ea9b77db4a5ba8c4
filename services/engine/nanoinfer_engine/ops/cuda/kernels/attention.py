"""The decode attention kernel: head norms, rotation, cache write and softmax in one launch.

A row's context is split over programs ("Flash-Decoding", 2023); the last program of a row and KV
head to finish adds the parts up, so no second launch is needed. The query heads that share a KV
head stand as the rows of one matrix product. A cache of 8 bits is converted tile by tile; the new
token attends to itself as it is stored, because that is what later tokens see of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanoinfer_engine.ops.cuda.kernels.heads import softmax_scores, stored, transformed_heads


@triton.jit
def _tile(
    keys,
    values,
    slot_stride,
    table,
    kv_head,
    start,
    end,
    dims,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
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
def _attend(q, k, v, seen, factor, top, total, acc, SOFTCAP: tl.constexpr):
    """One tile of the online softmax (arXiv:2205.14135), in base 2.

    A tile with nothing to see leaves everything as it was, also while `top` is still -inf.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    scores = softmax_scores(tl.dot(q, tl.trans(k)), factor, SOFTCAP)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return higher, total, acc


@triton.jit
def _append(
    key, value, keys, values, slot_stride, table, source, kv_head, gain, rotary, last, eps, dims,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Put the new token's key and value at `source` into the cache; both, [1, dims] and [dims]."""
    one = tl.arange(0, 1)
    inside = (one[:, None] < 1) & (dims[None, :] < DIM)
    k = transformed_heads(
        key + source, one, DIM, dims, inside, gain, rotary, last, eps, DIM, NORM, ROTARY
    )
    k = stored(k, keys)
    v = stored(tl.load(value + source + dims, mask=dims < DIM, other=0.0), values)
    block = tl.load(table + last // BLOCK_SIZE)
    slot = block.to(tl.int64) * BLOCK_SIZE + last % BLOCK_SIZE
    target = slot * slot_stride + kv_head * DIM + dims
    tl.store(keys + target[None, :], k, mask=dims[None, :] < DIM)
    tl.store(values + target, v, mask=dims < DIM)
    return k, v


@triton.jit
def _first_state(
    q, key, value, keys, values, slot_stride, table, source, kv_head, gain, rotary, last, eps,
    factor, dims, split, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The online softmax before any cached tile: the first program has the new token in it."""
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    if split == 0:
        k, v = _append(
            key, value, keys, values, slot_stride, table, source, kv_head, gain, rotary, last, eps,
            dims, DIM, BLOCK_SIZE, NORM, ROTARY,
        )  # fmt: skip
        product = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)
        top = softmax_scores(product, factor, SOFTCAP)
        total += 1.0
        acc += v.to(tl.float32)[None, :]
    return top, total, acc


@triton.jit
def _leave(
    output, parts, maxima, sums, arrived, top, total, acc, pair, heads, dims, split, num_splits,
    needed, GROUP: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Store the result, or one of `needed` parts; whoever comes last with a part adds them up."""
    inside = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    places = (pair * GROUP + heads).to(tl.int64)
    target = output + places[:, None] * DIM + dims[None, :]
    if not SPLIT:  # noqa: SIM114 - decided when compiled, and prunes the rest
        tl.store(target, (acc / total[:, None]).to(output.dtype.element_ty), mask=inside)
    elif needed == 1:
        tl.store(target, (acc / total[:, None]).to(output.dtype.element_ty), mask=inside)
    else:
        part = places * num_splits + split
        tl.store(parts + part[:, None] * DIM + dims[None, :], acc, mask=inside)
        tl.store(maxima + part, top, mask=heads < GROUP)
        tl.store(sums + part, total, mask=heads < GROUP)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + pair, 1, sem="acq_rel")
        if before == needed - 1:
            tl.debug_barrier()
            _add_up(
                output, parts, maxima, sums, pair * GROUP, num_splits, needed, dims,
                GROUP, DIM, MOST,
            )  # fmt: skip
            tl.store(arrived + pair, 0)


@triton.jit
def decode_kernel(
    query, key, value, input_stride, keys, values, slot_stride, tables, table_stride, contexts,
    rotary, query_gain, key_gain, output, parts, maxima, sums, arrived, eps, scale, num_splits,
    WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, MOST: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
    SOFTCAP: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for a row, a KV head and a share of the context; see `decode.decode_attention`."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    context = tl.load(contexts + row)
    last = context - 1  # the new token is not read from the cache
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
        k, v, seen = _tile(
            keys, values, slot_stride, table, kv_head, begin, end, dims, DIM, BLOCK_SIZE, TILE
        )
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (split >= needed) | (context <= 0):
        return

    heads = tl.arange(0, GROUP_PAD)
    inside = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    start = query + row.to(tl.int64) * input_stride + kv_head * GROUP * DIM
    q = transformed_heads(
        start, heads, DIM, dims, inside, query_gain, rotary, last, eps, DIM, NORM, ROTARY
    ).to(output.dtype.element_ty)
    factor = scale * 1.4426950408889634  # log2(e): the softmax is computed in base 2
    source = row.to(tl.int64) * input_stride + kv_head * DIM
    top, total, acc = _first_state(
        q, key, value, keys, values, slot_stride, table, source, kv_head, key_gain, rotary, last,
        eps, factor, dims, split, GROUP_PAD, DIM, DIM_PAD, BLOCK_SIZE, NORM, ROTARY, SOFTCAP,
    )  # fmt: skip
    if PREFETCH:
        top, total, acc = _attend(q, k, v, seen, factor, top, total, acc, SOFTCAP)
        begin += TILE
    for position in range(begin, end, TILE):
        k, v, seen = _tile(
            keys, values, slot_stride, table, kv_head, position, end, dims, DIM, BLOCK_SIZE, TILE
        )
        top, total, acc = _attend(q, k, v, seen, factor, top, total, acc, SOFTCAP)

    _leave(
        output, parts, maxima, sums, arrived, top, total, acc, row * KV_HEADS + kv_head, heads,
        dims, split, num_splits, needed, GROUP, DIM, SPLIT, MOST,
    )  # fmt: skip


@triton.jit
def _add_up(
    output,
    parts,
    maxima,
    sums,
    first_head,
    num_splits,
    needed,
    dims,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    MOST: tl.constexpr,
):
    """Combine the first `needed` parts of each of GROUP heads into `output`."""
    base = first_head.to(tl.int64)
    splits = tl.arange(0, MOST)
    here = splits < needed
    for member in tl.static_range(GROUP):
        part = (base + member) * num_splits + splits
        top = tl.load(maxima + part, mask=here, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(sums + part, mask=here, other=0.0, cache_modifier=".cg")
        acc = tl.load(
            parts + part[:, None] * DIM + dims[None, :],
            mask=here[:, None] & (dims[None, :] < DIM),
            other=0.0,
            cache_modifier=".cg",
        )
        weight = tl.exp2(top - tl.max(top, axis=0))
        value = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
        tl.store(
            output + (base + member) * DIM + dims,
            value.to(output.dtype.element_ty),
            mask=dims < DIM,
        )
