"""One decoder for every family: pre-norm blocks of attention and MLP, written in operations.

What differs between families is a flag or a size in `ModelConfig`. Query, key and value are one
linear layer, gate and up another: fewer, larger products. The parameters live here; how they are
run is the business of the operations that `forward` is given.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from nanoinfer_engine.core.config import CheckpointError, ModelConfig
from nanoinfer_engine.ops import InnerT, Ops, StepT, StreamT
from nanoinfer_engine.ops.linear import FullLinear, Linear
from nanoinfer_engine.ops.modules import Activation, AttentionLayer, Norm


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


class Layer(nn.Module):
    """Parameters of one block; `up` holds gate and up where the MLP is gated."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dtype: torch.dtype,
        linear: type[Linear],
        rotary: Tensor | None,
    ) -> None:
        """`index` counts from 0; `linear` is the format of the block's weights."""
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))

        def product(name: str, size_in: int, size_out: int, *, bias: bool) -> Linear:
            try:
                return linear(size_in, size_out, dtype, bias=bias)
            except ValueError as error:
                raise CheckpointError(f"layers.{index}.{name}: {error}") from error

        def head_norm() -> Norm | None:
            return Norm(config.head_dim, config.norm_eps) if config.qk_norm else None

        self.attention_norm = _norm(config)
        self.qkv = product("qkv", hidden, width + 2 * kv_width, bias=config.qkv_bias)
        self.query_norm, self.key_norm = head_norm(), head_norm()
        self.output = product("output", width, hidden, bias=config.output_bias)
        self.mlp_norm = _norm(config)
        self.activation = Activation(config.activation, gated=config.topology == "decoder")
        up = 2 * inner if self.activation.gated else inner
        self.up = product("up", hidden, up, bias=config.mlp_bias)
        self.down = product("down", inner, hidden, bias=config.mlp_bias)
        self.attention = AttentionLayer(
            index,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self.query_norm,
            self.key_norm,
            rotary,
            config.sliding_windows[index],
        )

    def forward(
        self,
        ops: Ops[StepT, StreamT, InnerT],
        stream: StreamT,
        step: StepT,
        kept: Tensor | None = None,
    ) -> StreamT:
        """The stream behind this block: of the `kept` tokens alone, where they are given."""
        qkv = ops.project(stream, self.attention_norm, self.qkv)
        attended = ops.attend(self.attention, qkv, step)
        if kept is not None:
            stream, attended = ops.select(stream, attended, kept)
        stream = ops.add(stream, attended, self.output)
        inner = ops.project(stream, self.mlp_norm, self.up, self.activation)
        return ops.add(stream, inner, self.down)


class Decoder(nn.Module):
    """Token ids and positions → residual stream → logits."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        linear: type[Linear] = FullLinear,
        rotary: Tensor | None = None,
    ) -> None:
        """Parameters are made on the ambient device (meta, until loaded).

        `linear` is the format of the blocks' weights; embeddings and head stay in `dtype`. `rotary`
        is as `rotary_table` gives it, None where positions are learned.
        """
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.position_embedding: nn.Embedding | None = None
        if config.topology == "gpt2":
            self.position_embedding = nn.Embedding(
                config.max_position_embeddings, config.hidden_size, dtype=dtype
            )
        self.layers = nn.ModuleList(
            Layer(config, index, dtype, linear, rotary) for index in range(config.num_layers)
        )
        self.norm = _norm(config)
        self.head = FullLinear(config.hidden_size, config.vocab_size, dtype)
        self.is_tied = config.tie_word_embeddings
        if self.is_tied:
            self.head.weight = cast(nn.Parameter, self.embedding.weight)
        for module in self.modules():
            if isinstance(module, Norm):
                module.to(dtype)

    def allocate(self, module: nn.Module, device: torch.device) -> None:
        """Give a module's own parameters zeroed memory on `device`; a tied head stays tied."""
        if self.is_tied and module in (self.embedding, self.head):
            self.head.allocate(device)
            self.embedding.weight = self.head.weight
        elif isinstance(module, Linear):
            module.allocate(device)
        else:
            for name, value in list(module.named_parameters(recurse=False)):
                memory = torch.zeros(value.shape, dtype=value.dtype, device=device)
                setattr(module, name, nn.Parameter(memory, requires_grad=False))

    def forward(
        self, ops: Ops[StepT, StreamT, InnerT], step: StepT, kept: Tensor | None = None
    ) -> StreamT:
        """The residual stream [tokens, hidden] behind all blocks, not normalised yet.

        With `kept` [any], indices into the tokens, of those alone and in that order: behind the
        last block's attention no token reads another, so the rest of that block is left out for
        tokens that nobody asks for.
        """
        stream = ops.embed(self.embedding, self.position_embedding, step)
        *layers, last = (cast(Layer, layer) for layer in self.layers)
        for layer in layers:
            stream = layer(ops, stream, step)
        return last(ops, stream, step, kept)  # type: ignore[no-any-return]

    def logits(self, ops: Ops[StepT, StreamT, InnerT], stream: StreamT) -> Tensor:
        """[rows, hidden] → [rows, vocabulary]."""
        return ops.logits(stream, self.norm, self.head)


def _norm(config: ModelConfig) -> Norm:
    is_gpt2 = config.topology == "gpt2"
    kind: Literal["layer", "rms"] = "layer" if is_gpt2 else "rms"
    return Norm(config.hidden_size, config.norm_eps, kind, bias=config.norm_bias)
