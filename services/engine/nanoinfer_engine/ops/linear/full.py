"""Weights as they are: FP32, FP16 or BF16."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanoinfer_engine.ops.linear.base import Copy, Linear


class FullLinear(Linear):
    """A weight [out, in] in the dtype of the activations."""

    weight: nn.Parameter

    def make_weight(self) -> None:
        """One matrix."""
        weight = torch.empty((self.out_features, self.in_features), dtype=self.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def allocate(self, device: torch.device) -> None:
        """On the CPU the matrix lies in memory as [in, out] (same shape, other strides).

        MKL then takes a quarter to a half less time for 4 to 32 rows, and no more for one.
        """
        super().allocate(device)
        if device.type == "cpu":
            memory = torch.zeros((self.in_features, self.out_features), dtype=self.dtype)
            self.weight = nn.Parameter(memory.t(), requires_grad=False)

    def load_rows(self, first: int, piece: Tensor, copy: Copy) -> None:
        """Copy the rows, converted to the parameter's dtype."""
        copy(piece, self.weight[first : first + len(piece)])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return functional.linear(x, self.weight, self.bias)
