"""One decoder for the Llama family: Llama 2/3, Mistral, Qwen2, Qwen3, SmolLM2, Phi-3.

Pre-norm blocks of RMSNorm, grouped-query attention with rotary positions, and a gated MLP; what
differs between members is a flag or a size in `ModelConfig`. Query, key and value are one linear
layer, gate and up another: fewer, larger multiplications. Knows neither batches nor the cache's
shape; attention goes through the backend that `forward` is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models.layout import CheckpointLayout, ModuleSource
from nanoinfer_engine.ops.attention import AttentionBackend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
"""By the name in `ModelConfig`."""

PlanT = TypeVar("PlanT")

# (checkpoint module, our module, part of ours) within a layer; parts in row order
_Names = tuple[tuple[str, str, str | None], ...]

_SPLIT_TENSORS: _Names = (
    ("self_attn.q_proj", "attention.qkv", "query"),
    ("self_attn.k_proj", "attention.qkv", "key"),
    ("self_attn.v_proj", "attention.qkv", "value"),
    ("mlp.gate_proj", "mlp.gate_up", "mlp"),
    ("mlp.up_proj", "mlp.gate_up", "mlp"),
)
_FUSED_TENSORS: _Names = (
    ("self_attn.qkv_proj", "attention.qkv", None),
    ("mlp.gate_up_proj", "mlp.gate_up", None),
)
_COMMON_TENSORS: _Names = (
    ("input_layernorm", "attention_norm", None),
    ("self_attn.o_proj", "attention.output", None),
    ("post_attention_layernorm", "mlp_norm", None),
    ("mlp.down_proj", "mlp.down", None),
)
_QK_NORM_TENSORS: _Names = (
    ("self_attn.q_norm", "attention.query_norm", None),
    ("self_attn.k_norm", "attention.key_norm", None),
)


def checkpoint_layout(config: ModelConfig) -> CheckpointLayout:
    """The Hugging Face names of this architecture (Phi-3 stores its linears fused)."""
    parts = {
        "query": config.num_heads * config.head_dim,
        "key": config.num_kv_heads * config.head_dim,
        "value": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
    }
    table = _COMMON_TENSORS
    table += _FUSED_TENSORS if config.model_type == "phi3" else _SPLIT_TENSORS
    table += _QK_NORM_TENSORS if config.qk_norm else ()
    sources = [ModuleSource("embed_tokens", "embedding"), ModuleSource("norm", "norm")]
    sources += [
        ModuleSource(f"layers.{layer}.{theirs}", f"layers.{layer}.{ours}", parts.get(part or ""))
        for layer in range(config.num_layers)
        for theirs, ours, part in table
    ]
    if not config.tie_word_embeddings:
        sources.append(ModuleSource("lm_head", "head"))
    return CheckpointLayout(
        tuple(sources),
        prefix="model.",
        ignored=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
        tied=("lm_head.weight", "embedding.weight") if config.tie_word_embeddings else None,
    )


def rotary_table(
    config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[positions, 2, 1, head dim]: cosines, and sines with the first half negated.

    With x = (a, b) in halves, the rotated vector is x * cos + (b, a) * (-sin, sin).
    """
    frequencies = torch.tensor(config.rope.inverse_frequencies(config.head_dim), device=device)
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1)
    return table.unsqueeze(2).to(dtype)


Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines of a step's positions, each [tokens, 1, head dim]."""


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn [tokens, heads, head dim] by its positions' angles."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * rotary[0], swapped, rotary[1])


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        """`size` is the last dimension."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Fused query-key-value projection, optional head norms, rotation, backend, output."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """`layer` is the index under which the backend keeps this layer's K and V."""
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        width = config.num_heads * config.head_dim
        total = width + 2 * config.num_kv_heads * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, total, bias=config.qkv_bias)
        self.output = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        backend: AttentionBackend[PlanT],
        plan: PlanT,
        kept: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] → [tokens, hidden], or of the `kept` tokens alone."""
        rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv(hidden).view(-1, rotated + self.num_kv_heads, self.head_dim)
        if self.query_norm is None or self.key_norm is None:
            query_key = rotate(qkv[:, :rotated], rotary)
            query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        else:
            query = rotate(self.query_norm(qkv[:, : self.num_heads]), rotary)
            key = rotate(self.key_norm(qkv[:, self.num_heads : rotated]), rotary)
        attended = backend.forward(self.layer, query, key, qkv[:, rotated:], plan)
        if kept is not None:
            attended = attended.index_select(0, kept)
        return self.output(attended.flatten(1))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up fused (SwiGLU, GEGLU: arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        """Sizes, biases and the activation from `config`."""
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activate = ACTIVATIONS[config.activation]
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=config.mlp_bias)
        self.down = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(self.activate(gate).mul_(up))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """`layer` counts from 0."""
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        backend: AttentionBackend[PlanT],
        plan: PlanT,
        kept: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] → the same tensor, added to; a new one where some are `kept`."""
        attended = self.attention(self.attention_norm(hidden), rotary, backend, plan, kept)
        if kept is not None:
            hidden = hidden.index_select(0, kept)
        hidden += attended
        hidden += self.mlp(self.mlp_norm(hidden))
        return hidden


class Decoder(nn.Module):
    """Token ids and positions → hidden states → logits."""

    def __init__(self, config: ModelConfig, rotary: Tensor) -> None:
        """Parameters are made on the ambient device (meta, until loaded); `rotary`: see above."""
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = rotary

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        backend: AttentionBackend[PlanT],
        plan: PlanT,
        kept: Tensor | None = None,
    ) -> Tensor:
        """[tokens], [tokens] → normalised hidden states [tokens, hidden].

        With `kept` [any], indices into the tokens, of those alone and in that order: behind the
        last layer's attention no token reads another, so the rest of that layer is left out for
        tokens that nobody asks for.
        """
        hidden: Tensor = self.embedding(token_ids)
        cos, sin = self.rotary.index_select(0, positions).unbind(1)
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, (cos, sin), backend, plan)
        hidden = last(hidden, (cos, sin), backend, plan, kept)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocabulary]."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return functional.linear(hidden, weight)
