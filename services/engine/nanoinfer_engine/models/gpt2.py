"""GPT-2 and nanoGPT: LayerNorm, learned positions, multi-head attention, a plain MLP.

nanoGPT differs in what its checkpoint stores (linears as [out, in], biases optional) and in the
exact GELU, not in topology.
"""

from __future__ import annotations

import re
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models.layout import CheckpointLayout, ModuleSource
from nanoinfer_engine.ops.attention import AttentionBackend

PlanT = TypeVar("PlanT")

_MODULES = (("wte", "embedding"), ("wpe", "position_embedding"), ("ln_f", "norm"))
_LAYER_NORMS = (("ln_1", "attention_norm"), ("ln_2", "mlp_norm"))
_LAYER_LINEARS = (
    ("attn.c_attn", "attention.qkv"),
    ("attn.c_proj", "attention.output"),
    ("mlp.c_fc", "mlp.up"),
    ("mlp.c_proj", "mlp.down"),
)


def checkpoint_layout(config: ModelConfig) -> CheckpointLayout:
    """GPT-2's names; the Hugging Face checkpoint stores its linears as [in, out]."""
    transposed = config.model_type == "gpt2"
    sources = [ModuleSource(theirs, ours) for theirs, ours in _MODULES]
    for layer in range(config.num_layers):
        theirs_prefix, ours_prefix = f"h.{layer}.", f"layers.{layer}."
        sources += [ModuleSource(theirs_prefix + a, ours_prefix + b) for a, b in _LAYER_NORMS]
        sources += [
            ModuleSource(theirs_prefix + a, ours_prefix + b, transposed=transposed)
            for a, b in _LAYER_LINEARS
        ]
    if not config.tie_word_embeddings:
        sources.append(ModuleSource("lm_head", "head"))
    return CheckpointLayout(
        tuple(sources),
        prefix="transformer.",
        # the causal mask, stored as a buffer by older versions
        ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
        tied=("lm_head.weight", "embedding.weight") if config.tie_word_embeddings else None,
    )


class Attention(nn.Module):
    """Fused query-key-value projection, backend, output projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """`layer` is the index under which the backend keeps this layer's K and V."""
        super().__init__()
        self.layer = layer
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        hidden = config.hidden_size
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=config.qkv_bias)
        self.output = nn.Linear(hidden, hidden, bias=config.output_bias)

    def forward(
        self,
        hidden: Tensor,
        backend: AttentionBackend[PlanT],
        plan: PlanT,
        kept: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] → [tokens, hidden], or of the `kept` tokens alone."""
        qkv = self.qkv(hidden).view(-1, 3, self.num_heads, self.head_dim)
        attended = backend.forward(self.layer, qkv[:, 0], qkv[:, 1], qkv[:, 2], plan)
        if kept is not None:
            attended = attended.index_select(0, kept)
        return self.output(attended.flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        """Sizes, biases and the form of GELU from `config`."""
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down = nn.Linear(inner, hidden, bias=config.mlp_bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        inner = functional.gelu(self.up(hidden), approximate=self.approximate)
        return self.down(inner)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """`layer` counts from 0."""
        super().__init__()
        size, eps, bias = config.hidden_size, config.norm_eps, config.norm_bias
        self.attention_norm = nn.LayerNorm(size, eps, bias=bias)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(size, eps, bias=bias)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        backend: AttentionBackend[PlanT],
        plan: PlanT,
        kept: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] → the same tensor, added to; a new one where some are `kept`."""
        attended = self.attention(self.attention_norm(hidden), backend, plan, kept)
        if kept is not None:
            hidden = hidden.index_select(0, kept)
        hidden += attended
        hidden += self.mlp(self.mlp_norm(hidden))
        return hidden


class GPT2(nn.Module):
    """Token ids and positions → hidden states → logits."""

    def __init__(self, config: ModelConfig) -> None:
        """Parameters are made on the ambient device (meta, until loaded)."""
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        backend: AttentionBackend[PlanT],
        plan: PlanT,
        kept: Tensor | None = None,
    ) -> Tensor:
        """[tokens], [tokens] → normalised hidden states [tokens, hidden]; `kept`: see `Decoder`."""
        hidden: Tensor = self.embedding(token_ids) + self.position_embedding(positions)
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, backend, plan)
        hidden = last(hidden, backend, plan, kept)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocabulary]."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return functional.linear(hidden, weight)
