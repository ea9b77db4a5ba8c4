"""INT8 weights with a scale for each output; activations stay in full precision.

Half the memory of FP16 on any device, and errors of the weights alone: no token's precision depends
on another's. Rows are restored a thousand at a time, so that no product holds a weight in full.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanoinfer_engine.ops.linear.base import Copy, Linear

_LARGEST = 127
_SMALLEST_SCALE = 1e-30  # divisor of a row of zeros
_ROWS_AT_ONCE = 1024


def quantize_weight(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, in] → int8 values and float32 scales [rows] whose product is `rows`, rounded.

    A row with a NaN or an infinity gives NaN wherever it multiplies.
    """
    rows = rows.float()
    scales = (rows.abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    values = (rows / scales.unsqueeze(-1)).round().nan_to_num(0.0)
    return values.to(torch.int8), scales


class Int8Linear(Linear):
    """A weight [out, in] in int8 and a float32 scale [out] for its rows."""

    weight: nn.Parameter
    scale: nn.Parameter

    def make_weight(self) -> None:
        """Two parameters."""
        values = torch.empty((self.out_features, self.in_features), dtype=torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        scale = torch.empty(self.out_features, dtype=torch.float32)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def load_rows(self, first: int, piece: Tensor, copy: Copy) -> None:
        """Quantise the rows on the device, a thousand at a time."""
        for start in range(0, len(piece), _ROWS_AT_ONCE):
            part = piece[start : start + _ROWS_AT_ONCE]
            full = torch.empty(part.shape, dtype=self.dtype, device=self.weight.device)
            copy(part, full)
            rows = slice(first + start, first + start + len(part))
            self.weight[rows], self.scale[rows] = quantize_weight(full)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]; rows are scaled before the product, which FP16 might overflow."""
        output = x.new_empty((*x.shape[:-1], self.out_features))
        for start in range(0, self.out_features, _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            rows = (self.weight[part] * self.scale[part].unsqueeze(-1)).to(x.dtype)
            output[..., part] = functional.linear(x, rows)
        return output if self.bias is None else output.add_(self.bias)
