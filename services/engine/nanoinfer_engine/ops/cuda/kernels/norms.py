"""Row kernels between the matrix products: embedding, residual + RMSNorm, activation · mul."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.activation import activate
from nanoinfer_engine.ops.cuda.kernels.launch import ceil_div, pdl_options, power_of_two
from nanoinfer_engine.ops.cuda.kernels.quantize import store_quantized


@triton.jit
def _embed_kernel(
    tokens,
    sources,
    sampled,
    table,
    output,
    first,
    num_ids,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.arange(0, BLOCK)
    source = tl.load(sources + row)
    token = tl.load(tokens + row)
    if source >= 0:
        # -1 marks a row that could not be sampled; what it computes is thrown away
        token = tl.maximum(tl.load(sampled + source), 0)
    token -= first
    here = (token >= 0) & (token < num_ids)
    values = tl.load(
        table + token.to(tl.int64) * WIDTH + columns, mask=here & (columns < WIDTH), other=0.0
    )
    tl.store(output + row.to(tl.int64) * WIDTH + columns, values, mask=columns < WIDTH)


def embed(
    tokens: Tensor,
    sources: Tensor,
    sampled: Tensor,
    table: Tensor,
    output: Tensor,
    *,
    first: int = 0,
    pdl: bool = False,
) -> Tensor:
    """Embedding rows of [rows] tokens into `output` [rows, width].

    Where `sources` is not negative, the token is `sampled[source]`, which the last step left there.
    Begins when what is before it has ended; with `pdl` what follows may begin earlier.
    `table` holds the ids from `first` on; those outside it give zeros.
    """
    width = table.shape[1]
    _embed_kernel[(len(tokens),)](
        tokens,
        sources,
        sampled,
        table,
        output,
        first,
        len(table),
        WIDTH=width,
        BLOCK=power_of_two(width),
        num_warps=4,
        PDL=pdl,
    )
    return output


@triton.jit
def _add_norm_kernel(
    residual,
    delta,
    gain,
    output,
    scales,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    g = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(residual + row * WIDTH + columns, mask=inside, other=0.0)
    if PARTS > 0:
        total = x.to(tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(
                delta + (part * num_rows + row) * WIDTH + columns, mask=inside, other=0.0
            ).to(tl.float32)
        x = total.to(residual.dtype.element_ty)
        tl.store(residual + row * WIDTH + columns, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    y = x * scale * g
    if QUANTIZED:
        store_quantized(y, output, scales, row, columns, WIDTH)
    else:
        tl.store(output + row * WIDTH + columns, y.to(output.dtype.element_ty), mask=inside)


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    output: Tensor,
    *,
    scales: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """residual += the sum of `delta` [parts, rows, width], in place; `output` = its RMSNorm.

    With `scales` [rows, 1] in float32 the output is e4m3, quantised row by row.
    """
    num_rows, width = residual.shape
    _add_norm_kernel[(num_rows,)](
        residual,
        residual if delta is None else delta,
        gain,
        output,
        residual if scales is None else scales,
        num_rows,
        eps,
        WIDTH=width,
        BLOCK=power_of_two(width),
        PARTS=0 if delta is None else delta.shape[0],
        QUANTIZED=scales is not None,
        num_warps=4 if width <= 2048 else 8,
        **pdl_options(pdl),
    )
    return output


@triton.jit
def _gate_mul_kernel(
    gate_up,
    output,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0)
    value = activate(gate, ACTIVATION) * up.to(tl.float32)
    tl.store(output + row * WIDTH + columns, value.to(output.dtype.element_ty), mask=inside)


def gate_mul(
    gate_up: Tensor, activation: str, output: Tensor | None = None, *, pdl: bool = False
) -> Tensor:
    """[rows, 2 * width] → activation(first half) * second half, [rows, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if output is None:
        output = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block = min(power_of_two(width), 2048)
    _gate_mul_kernel[(rows, ceil_div(width, block))](
        gate_up,
        output,
        WIDTH=width,
        BLOCK=block,
        ACTIVATION=activation,
        num_warps=4,
        **pdl_options(pdl),
    )
    return output
