"""What happens to heads before they attend: norm and rotation; and the form of it for prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.launch import power_of_two


@dataclass(frozen=True)
class HeadTransform:
    """What happens to queries and keys before they meet; None where it does not.

    `rotary` is [positions, 2, 1, head dim] as the decoder keeps it; gains are [head dim].
    """

    rotary: Tensor | None = None
    query_gain: Tensor | None = None
    key_gain: Tensor | None = None
    eps: float = 0.0


@triton.jit
def transformed_heads(
    pointer,
    rows,
    row_stride,
    columns,
    mask,
    gain,
    rotary,
    position,
    eps,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
):
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
def stored(x, cache):
    """`x` in the number format of what `cache` points to: e4m3 saturates, a NaN stays one."""
    x = x.to(tl.float32)
    if cache.dtype.element_ty == tl.float8e4nv:
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return x.to(cache.dtype.element_ty)


@triton.jit
def softmax_scores(products, factor, SOFTCAP: tl.constexpr):
    """query · key → scores of a softmax in base 2; `factor` is the scale times log2(e).

    With SOFTCAP c, above 0, the scores in base e are c · tanh(score / c).
    """
    scores = products * factor
    if SOFTCAP > 0:
        cap = SOFTCAP * 1.4426950408889634
        # tanh(x) is 1 - 2 / (1 + exp(2 · x)), which neither overflow nor underflow makes NaN
        scores = cap - 2 * cap / (1.0 + tl.exp(scores * (2 / cap)))
    return scores


@triton.jit
def _rotate_write_kernel(
    query, key, value, input_stride, keys, values, slot_stride, slots, positions, rotary,
    query_gain, key_gain, query_out, key_out, value_out, eps,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, KV_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
    KEY_COPY: tl.constexpr, VALUE_COPY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    position = tl.load(positions + token)
    heads = tl.arange(0, HEADS_PAD)
    inside = (heads[:, None] < HEADS) & (dims[None, :] < DIM)
    q = transformed_heads(
        query + token * input_stride,
        heads,
        DIM,
        dims,
        inside,
        query_gain,
        rotary,
        position,
        eps,
        DIM,
        NORM,
        ROTARY,
    )
    tl.store(
        query_out + (token * HEADS + heads[:, None]) * DIM + dims[None, :],
        q.to(query_out.dtype.element_ty),
        mask=inside,
    )
    heads = tl.arange(0, KV_PAD)
    inside = (heads[:, None] < KV_HEADS) & (dims[None, :] < DIM)
    k = transformed_heads(
        key + token * input_stride,
        heads,
        DIM,
        dims,
        inside,
        key_gain,
        rotary,
        position,
        eps,
        DIM,
        NORM,
        ROTARY,
    )
    k = stored(k, keys)
    places = heads[:, None] * DIM + dims[None, :]
    v = stored(tl.load(value + token * input_stride + places, mask=inside, other=0.0), values)
    slot = tl.load(slots + token).to(tl.int64)
    target = slot * slot_stride
    own = token * KV_HEADS * DIM + places
    if KEY_COPY:
        tl.store(key_out + own, k.to(key_out.dtype.element_ty), mask=inside)
    if VALUE_COPY:
        tl.store(value_out + own, v.to(value_out.dtype.element_ty), mask=inside)
    inside = inside & (slot >= 0)
    tl.store(keys + target + places, k, mask=inside)
    tl.store(values + target + places, v, mask=inside)


def rotate_and_write(
    heads: tuple[Tensor, Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
    positions: Tensor,
    transform: HeadTransform,
    dtype: torch.dtype,
    *,
    copies: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attends, in `dtype`: query, key and value; the last two also go to `slots` of the cache,
    but for tokens whose slot is negative: those are padding.

    Query and key are transformed, key and value as the cache gives them back; without `copies`
    those two are returned as they came. Shapes as in `decode_attention`, with tokens in the place
    of rows; one kernel, no workspace.
    """
    query, key, value = heads
    tokens, num_heads, dim = query.shape
    kv_heads = key.shape[1]
    query_out = torch.empty((tokens, num_heads, dim), dtype=dtype, device=query.device)
    key_out, value_out = key, value
    if copies:
        key_out = torch.empty((tokens, kv_heads, dim), dtype=dtype, device=query.device)
    if copies and not value.dtype == dtype == cache[1].dtype:  # else it is stored as it came
        value_out = torch.empty_like(key_out)
    unused = query
    _rotate_write_kernel[(tokens,)](
        query,
        key,
        value,
        query.stride(0),
        *cache,
        cache[0].stride(1),
        slots,
        positions,
        unused if transform.rotary is None else transform.rotary,
        unused if transform.query_gain is None else transform.query_gain,
        unused if transform.key_gain is None else transform.key_gain,
        query_out,
        key_out,
        value_out,
        transform.eps,
        HEADS=num_heads,
        HEADS_PAD=power_of_two(num_heads),
        KV_HEADS=kv_heads,
        KV_PAD=power_of_two(kv_heads),
        DIM=dim,
        DIM_PAD=power_of_two(dim),
        NORM=transform.query_gain is not None,
        ROTARY=transform.rotary is not None,
        KEY_COPY=key_out is not key,
        VALUE_COPY=value_out is not value,
        num_warps=4,
    )
    return query_out, key_out, value_out
