"""Activations in 8 bits: each row as e4m3 with a scale of its own, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.activation import activate
from nanoinfer_engine.ops.cuda.kernels.launch import pdl_options, power_of_two


@triton.jit
def store_quantized(x, values, scales, row, columns, WIDTH: tl.constexpr):
    """Store float32 `x`, the row's `columns`, 0 past WIDTH, as e4m3 and a scale.

    An infinity gives an infinite scale and, divided by it, NaN; a NaN stays one. Both reach every
    product of the row.
    """
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) * (1.0 / 448.0), 1e-12)
    quotient = (x / scale).to(values.dtype.element_ty)
    tl.store(values + row * WIDTH + columns, quotient, mask=columns < WIDTH)
    tl.store(scales + row, scale)


@triton.jit
def _quantize_kernel(
    x,
    values,
    scales,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    start = x + row * WIDTH * (2 if GATED else 1) + columns
    value = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(start + WIDTH, mask=inside, other=0.0).to(tl.float32)
        value = activate(value, ACTIVATION) * up
    store_quantized(value, values, scales, row, columns, WIDTH)


def quantize_rows(x: Tensor, activation: str = "", *, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """[rows, width] → e4m3 values and float32 scales [rows, 1], as `quantization.quantize_rows`.

    With an activation x is [rows, 2 * width], and activation(first half) * second half quantised.
    """
    rows, width = x.shape[0], x.shape[1] // (2 if activation else 1)
    values = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _quantize_kernel[(rows,)](
        x,
        values,
        scales,
        WIDTH=width,
        BLOCK=power_of_two(width),
        GATED=bool(activation),
        ACTIVATION=activation,
        num_warps=4 if width <= 2048 else 8 if width <= 8192 else 16,
        **pdl_options(pdl),
    )
    return values, scales
