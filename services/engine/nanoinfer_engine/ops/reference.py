"""The operations in plain PyTorch, on any device: they define the truth for every other backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanoinfer_engine.ops.attention import ReferenceAttention, ReferencePlan
from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.ops.linear import Linear
from nanoinfer_engine.ops.modules import Activation, AttentionLayer, Norm

Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines of a step's positions, each [tokens, 1, head dim]."""


@dataclass(frozen=True)
class ReferenceStep:
    """A step's tokens [tokens], their positions [tokens], and how their rows attend."""

    token_ids: Tensor
    positions: Tensor
    plan: ReferencePlan
    _rotary: dict[int, Rotary] = field(default_factory=dict)

    def rotary(self, table: Tensor) -> Rotary:
        """The table's rows for the step's positions; looked up once a step."""
        key = id(table)
        if key not in self._rotary:
            cos, sin = table.index_select(0, self.positions).unbind(1)
            self._rotary[key] = cos, sin
        return self._rotary[key]


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn [tokens, heads, head dim] by its positions' angles."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * rotary[0], swapped, rotary[1])


class ReferenceOps:
    """Operations on tensors as they are: the residual stream is one tensor [tokens, hidden]."""

    def __init__(
        self, attention: ReferenceAttention, rank: Rank = ALONE, vocab_size: int | None = None
    ) -> None:
        """`vocab_size` is the whole model's; only several ranks need it."""
        self._attention, self._rank, self._vocab_size = attention, rank, vocab_size or 0

    def embed(
        self,
        table: nn.Embedding,
        positions: nn.Embedding | None,
        step: ReferenceStep,
        scale: float = 1.0,
    ) -> Tensor:
        """Rows of the rank's share, zeros for other ranks' ids, summed over the ranks."""
        if self._rank.size == 1:
            hidden = functional.embedding(step.token_ids, table.weight)
        else:
            local = step.token_ids - self._rank.index * len(table.weight)
            outside = (local < 0) | (local >= len(table.weight))
            rows = functional.embedding(local.masked_fill(outside, 0), table.weight)
            hidden = self._rank.add_up(rows.masked_fill(outside.unsqueeze(1), 0))
        if scale != 1.0:
            hidden *= scale
        if positions is not None:
            hidden += functional.embedding(step.positions, positions.weight)
        return hidden

    def project(
        self, stream: Tensor, norm: Norm, linear: Linear, activation: Activation | None = None
    ) -> Tensor:
        """Norm, product, activation."""
        product: Tensor = linear(norm(stream))
        return product if activation is None else activation(product)

    def attend(self, layer: AttentionLayer, qkv: Tensor, step: ReferenceStep) -> Tensor:
        """Norm and rotate the heads, then attend over gathered blocks."""
        query, key, value = layer.heads(qkv)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
            if layer.rotary is not None:
                rotary = step.rotary(layer.rotary)
                query, key = rotate(query, rotary), rotate(key, rotary)
        elif layer.rotary is not None:
            parts = qkv.view(len(qkv), layer.num_rotated + layer.num_kv_heads, layer.head_dim)
            both = rotate(parts[:, : layer.num_rotated], step.rotary(layer.rotary))
            query, key = both[:, : layer.num_heads], both[:, layer.num_heads :]
        attended = self._attention.forward(
            layer.index, query, key, value, step.plan, layer.scale, layer.softcap
        )
        return attended.flatten(1)

    def add(
        self, stream: Tensor, inner: Tensor, linear: Linear, norm: Norm | None = None
    ) -> Tensor:
        """The same tensor, added to."""
        product = self._rank.add_up(linear(inner))
        stream += product if norm is None else norm(product)
        return stream

    def select(self, stream: Tensor, inner: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Copies."""
        return stream.index_select(0, tokens), inner.index_select(0, tokens)

    def logits(self, stream: Tensor, norm: Norm, head: Linear) -> Tensor:
        """The ranks' shares, gathered."""
        return self._rank.gather(head(norm(stream)), self._vocab_size)
