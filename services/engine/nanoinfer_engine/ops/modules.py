"""Parts of a model that operations take besides tensors: norms, activations, attention layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
"""By the name in `ModelConfig`."""


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension."""

    def __init__(
        self,
        size: int,
        eps: float,
        kind: Literal["rms", "layer"] = "rms",
        *,
        bias: bool = False,
        offset: float = 0.0,
    ) -> None:
        """`size` is the last dimension; a bias is LayerNorm's alone.

        `offset` is added to stored weights as they are loaded. It keeps them in float32: the sum
        with a small weight would be rounded in fewer bits.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.eps, self.kind, self.offset = eps, kind, offset

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        if self.kind == "rms":
            wide = hidden.to(self.weight.dtype)
            output = functional.rms_norm(wide, self.weight.shape, self.weight, self.eps)
            return output.to(hidden.dtype)
        return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Activation:
    """The end of an MLP's first product: `name(x)`, or `name(gate) * up` where `gated`.

    Of a gated one the product's first half is the gate (SwiGLU, GEGLU: arXiv:2002.05202).
    """

    name: str
    gated: bool

    def __call__(self, product: Tensor) -> Tensor:
        """[..., out] → [..., out], or half as wide where it is gated."""
        if not self.gated:
            return ACTIVATIONS[self.name](product)
        gate, up = product.chunk(2, dim=-1)
        return ACTIVATIONS[self.name](gate).mul_(up)


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """Constants of one layer's attention: heads, their norms, rotation, window and scores.

    `index` is the layer's place in the KV cache. `rotary` is [positions, 2, 1, head dim]: cosines,
    and sines with the first half negated; None where positions are learned. A token sees the last
    `window` positions, itself included, or all. A score is query · key times `scale`, then, with a
    `softcap` c, c · tanh(score / c).
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_norm: Norm | None
    key_norm: Norm | None
    rotary: Tensor | None
    window: int | None
    scale: float
    softcap: float | None = None

    @property
    def num_rotated(self) -> int:
        """Query and key heads, which stand first in a product and are rotated."""
        return self.num_heads + self.num_kv_heads

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of query, key and value: [tokens, heads of each, head dim]."""
        parts = qkv.view(len(qkv), self.num_rotated + self.num_kv_heads, self.head_dim)
        return (
            parts[:, : self.num_heads],
            parts[:, self.num_heads : self.num_rotated],
            parts[:, self.num_rotated :],
        )
