"""FP8 weights and activations: e4m3 with a scale for each output and each activation row.

e4m3 has three bits of mantissa and reaches ±448. A weight has a scale for each output, an
activation one for each row, so that neither a large channel nor another request's token costs
anybody precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoinfer_engine.ops.kv_cache import FP8, FP8_MAX
from nanoinfer_engine.ops.linear.base import Copy, Linear

SMALLEST_SCALE = 1e-12
"""Divisor of a row of zeros."""

_MULTIPLE = 16  # of both sides of a weight: the matrix units' tiles
_ROWS_AT_ONCE = 1024


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, width] → e4m3 values and float32 scales [rows, 1] whose product is x, rounded.

    A NaN or infinity makes its whole row NaN when that is multiplied.
    """
    largest = x.abs().amax(-1, keepdim=True)
    scales = (largest.float() / FP8_MAX).clamp(min=SMALLEST_SCALE)
    return (x / scales).to(FP8), scales


def scaled_product(values: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """(values · scales) @ (weight · weight_scale) transposed, in bfloat16, on a CUDA device.

    [rows, in] e4m3 with [rows, 1], [out, in] e4m3 with [out]. bfloat16 is the one result that
    `torch._scaled_mm` gives everywhere where every row has its scale.
    """
    return torch._scaled_mm(
        values,
        weight.t(),
        scales,
        weight_scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


class Fp8Linear(Linear):
    """A weight [out, in] in e4m3 and a float32 scale [out] for its rows; e4m3 activations."""

    weight: nn.Parameter
    scale: nn.Parameter

    def make_weight(self) -> None:
        """Two parameters; ValueError where a side is no multiple of the matrix units' tiles."""
        if self.in_features % _MULTIPLE or self.out_features % _MULTIPLE:
            raise ValueError(
                f"{self.out_features} × {self.in_features} cannot be quantised to fp8:"
                f" both must be multiples of {_MULTIPLE}"
            )
        shape = self.out_features, self.in_features
        self.weight = nn.Parameter(torch.empty(shape, dtype=FP8), requires_grad=False)
        scale = torch.empty(self.out_features, dtype=torch.float32)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def load_rows(self, first: int, piece: Tensor, copy: Copy) -> None:
        """Quantise the rows on the device, a thousand at a time."""
        for start in range(0, len(piece), _ROWS_AT_ONCE):
            part = piece[start : start + _ROWS_AT_ONCE]
            full = torch.empty(part.shape, dtype=self.dtype, device=self.weight.device)
            copy(part, full)
            rows = slice(first + start, first + start + len(part))
            self.weight[rows], scales = quantize_rows(full)
            self.scale[rows] = scales[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] → [rows, out] in the dtype of `x`; on the CPU the same sums, slowly."""
        values, scales = quantize_rows(x)
        if x.is_cuda:
            product = scaled_product(values, scales, self.weight, self.scale).to(x.dtype)
        else:
            product = values.float() @ self.weight.float().t()
            product = (product * scales * self.scale).to(x.dtype)
        return product if self.bias is None else product + self.bias
