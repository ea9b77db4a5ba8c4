"""Matrix products of a few rows: reading the weights once is all that counts.

`gemv` is for one row and takes in what surrounds it in the decoder: RMSNorm before, a gate or
the residual sum after. `few_rows` is for up to 64 rows: the weights stand as the left operand, so
that the matrix units' long side is the output's. Both load their first weights before they wait
for the previous kernel. Weights of 8 bits are converted as they come; their `scale`, one number for
each row of the weight, multiplies the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.activation import activate
from nanoinfer_engine.ops.cuda.kernels.launch import ceil_div, pdl_options


@dataclass(frozen=True)
class GemvShape:
    """Rows of the weight per program, columns per pass, warps."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class TileShape:
    """Tile of `few_rows`; `splits` programs share the columns of one output."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _scaled(total, total_up, scales, n, N, GATED: tl.constexpr):
    """Both sums times the scales of their rows of the weight."""
    total *= tl.load(scales + n, mask=n < N, other=0.0)
    if GATED:
        total_up *= tl.load(scales + N + n, mask=n < N, other=0.0)
    return total, total_up


@triton.jit
def _gemv_kernel(
    x, weight, scales, bias, gain, output, N, K, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    # rows past the end repeat the last one: their sums are not stored
    rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + columns[None, :]
    upper = rows + N.to(tl.int64) * K
    last = tl.cdiv(K, BLOCK_K) * BLOCK_K - BLOCK_K
    inside = EVEN | (columns < K)
    tile = tl.load(rows, mask=inside[None, :], other=0.0)
    tile_up = tile
    if GATED:
        tile_up = tl.load(upper, mask=inside[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, last, BLOCK_K):
        v = tl.load(x + start + columns).to(tl.float32)
        if NORM:
            squares += v * v
            v = v * tl.load(gain + start + columns).to(tl.float32)
        inside = EVEN | (start + BLOCK_K + columns < K)
        following = tl.load(rows + start + BLOCK_K, mask=inside[None, :], other=0.0)
        acc += tile.to(tl.float32) * v[None, :]
        tile = following
        if GATED:
            following = tl.load(upper + start + BLOCK_K, mask=inside[None, :], other=0.0)
            acc_up += tile_up.to(tl.float32) * v[None, :]
            tile_up = following
    inside = EVEN | (last + columns < K)
    v = tl.load(x + last + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares += v * v
        v = v * tl.load(gain + last + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(acc + tile.to(tl.float32) * v[None, :], axis=1)
    total_up = total
    if GATED:
        total_up = tl.sum(acc_up + tile_up.to(tl.float32) * v[None, :], axis=1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        total, total_up = total * scale, total_up * scale
    if SCALED:
        total, total_up = _scaled(total, total_up, scales, n, N, GATED)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            total_up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        total = activate(total, ACTIVATION) * total_up
    if RESIDUAL:
        total += tl.load(output + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(output + n, total.to(output.dtype.element_ty), mask=n < N)


def gemv(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    shape: GemvShape,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    activation: str = "silu",
    residual: bool = False,
    pdl: bool = False,
) -> Tensor:
    """`output` [1, N] = weight [N, K] @ x [1, K], with what surrounds it.

    With `gain`, x is normalised by RMSNorm first. With `gated`, weight is [2 * N, K] and the
    result activation(first half) * second half. With `residual` the product is added to `output`.
    """
    num_outputs, columns = output.shape[1], weight.shape[1]
    _gemv_kernel[(ceil_div(num_outputs, shape.block_n),)](
        x,
        weight,
        x if scale is None else scale,
        x if bias is None else bias,
        x if gain is None else gain,
        output,
        num_outputs,
        columns,
        eps,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        EVEN=columns % shape.block_k == 0,
        NORM=gain is not None,
        GATED=gated,
        ACTIVATION=activation,
        RESIDUAL=residual,
        SCALED=scale is not None,
        BIAS=bias is not None,
        num_warps=shape.num_warps,
        **pdl_options(pdl),
    )
    return output


@triton.jit
def _few_rows_kernel(
    x,
    weight,
    scales,
    bias,
    output,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    share = K // SPLITS
    k = part * share + tl.arange(0, BLOCK_K)
    rows = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    inside = n[:, None] < N
    tile = tl.load(rows, mask=inside, other=0.0)
    if GATED:
        upper = rows + N.to(tl.int64) * K
        tile_up = tl.load(upper, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    inputs = x + m[None, :] * K + k[:, None]
    real = m[None, :] < M
    v = tl.load(inputs, mask=real, other=0.0)
    acc = tl.dot(tile.to(v.dtype), v)
    if GATED:
        acc_up = tl.dot(tile_up.to(v.dtype), v)
    for start in range(BLOCK_K, share, BLOCK_K):
        v = tl.load(inputs + start, mask=real, other=0.0)
        acc = tl.dot(tl.load(rows + start, mask=inside, other=0.0).to(v.dtype), v, acc)
        if GATED:
            following = tl.load(upper + start, mask=inside, other=0.0)
            acc_up = tl.dot(following.to(v.dtype), v, acc_up)
    if SCALED:
        acc *= tl.load(scales + n, mask=n < N, other=0.0)[:, None]
        if GATED:
            acc_up *= tl.load(scales + N + n, mask=n < N, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            acc_up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        acc = activate(acc, ACTIVATION) * acc_up
    target = output + (part * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(target, acc.to(output.dtype.element_ty), mask=inside & real)


def few_rows(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    shape: TileShape,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    gated: bool = False,
    activation: str = "silu",
    pdl: bool = False,
) -> Tensor:
    """`output` [splits, M, N]: parts whose sum is x [M, K] @ weight [N, K] transposed.

    K must be a multiple of block_k * splits. `bias` and `gated`, with its `activation` (as in
    `gemv`), need one split.
    """
    rows, columns = x.shape
    num_outputs = output.shape[-1]
    _few_rows_kernel[(ceil_div(num_outputs, shape.block_n), shape.splits)](
        x,
        weight,
        x if scale is None else scale,
        x if bias is None else bias,
        output,
        rows,
        num_outputs,
        columns,
        BLOCK_M=max(16, 1 << (rows - 1).bit_length()),
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        SPLITS=shape.splits,
        GATED=gated,
        ACTIVATION=activation,
        SCALED=scale is not None,
        BIAS=bias is not None,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **pdl_options(pdl),
    )
    return output
