"""The interface of a weight format: make the parameters, load a piece, multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Copy = Callable[[Tensor, Tensor], object]
"""Copies a tensor of a checkpoint, on the host, into one of the same shape on the device."""


class Linear(nn.Module):
    """y = x @ weight transposed + bias, weight [out, in]; the format is the subclass's.

    Parameters are made on the ambient device (meta, until loaded). `dtype` is that of activations.
    A format's parameters have one row an output, so that shares and pieces are ranges of rows.
    """

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = False
    ) -> None:
        """ValueError for sizes that the format cannot hold."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)
        self.make_weight()

    def make_weight(self) -> None:
        """Make the parameters that hold the weight."""
        raise NotImplementedError

    def allocate(self, device: torch.device) -> None:
        """Give every parameter zeroed memory on `device`."""
        for name, parameter in list(self.named_parameters()):
            memory = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(self, name, nn.Parameter(memory, requires_grad=False))

    def load_rows(self, first: int, piece: Tensor, copy: Copy) -> None:
        """Fill the outputs from `first` on with the full-precision rows `piece` [rows, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out] in plain PyTorch: the truth for every kernel of this format."""
        raise NotImplementedError
