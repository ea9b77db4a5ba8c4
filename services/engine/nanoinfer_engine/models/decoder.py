"""One decoder for every family: blocks of attention and MLP between norms, written in operations.

What differs between families is a flag or a size in `ModelConfig`. Query, key and value are one
linear layer, gate and up another: fewer, larger products. The parameters live here; how they are
run is the business of the operations that `forward` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from nanoinfer_engine.core.config import CheckpointError, ModelConfig, RopeConfig
from nanoinfer_engine.ops import InnerT, Ops, StepT, StreamT
from nanoinfer_engine.ops.linear import FullLinear, Linear
from nanoinfer_engine.ops.modules import Activation, AttentionLayer, Norm


def rotary_table(
    rope: RopeConfig, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[positions, 2, 1, head dim]: cosines, and sines with the first half negated.

    With x = (a, b) in halves, the rotated vector is x * cos + (b, a) * (-sin, sin).
    """
    frequencies = torch.tensor(rope.inverse_frequencies(head_dim), device=device)
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1)
    return table.unsqueeze(2).to(dtype)


def rotary_tables(
    config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor | None]:
    """Each layer's table, None where positions are learned; layers alike share theirs."""
    if config.topology == "gpt2":
        return [None] * config.num_layers
    local = config.local_rope or config.rope
    ropes = [config.rope if window is None else local for window in config.sliding_windows]
    tables = {
        rope: rotary_table(rope, config.head_dim, max_positions, dtype, device)
        for rope in set(ropes)
    }
    return [tables[rope] for rope in ropes]


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
            if not config.qk_norm:
                return None
            return Norm(config.head_dim, config.norm_eps, offset=config.norm_offset)

        self.attention_norm = _norm(config)
        self.qkv = product("qkv", hidden, width + 2 * kv_width, bias=config.qkv_bias)
        self.query_norm, self.key_norm = head_norm(), head_norm()
        self.output = product("output", width, hidden, bias=config.output_bias)
        self.attention_post_norm = _norm(config) if config.post_norms else None
        self.mlp_norm = _norm(config)
        self.activation = Activation(config.activation, gated=config.topology == "decoder")
        up = 2 * inner if self.activation.gated else inner
        self.up = product("up", hidden, up, bias=config.mlp_bias)
        self.down = product("down", inner, hidden, bias=config.mlp_bias)
        self.mlp_post_norm = _norm(config) if config.post_norms else None
        self.attention = AttentionLayer(
            index,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self.query_norm,
            self.key_norm,
            rotary,
            config.sliding_windows[index],
            config.attention_scale or config.head_dim**-0.5,
            config.attention_softcap,
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
        stream = ops.add(stream, attended, self.output, self.attention_post_norm)
        inner = ops.project(stream, self.mlp_norm, self.up, self.activation)
        return ops.add(stream, inner, self.down, self.mlp_post_norm)


class Decoder(nn.Module):
    """Token ids and positions → residual stream → logits."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        linear: type[Linear],
        rotary: Sequence[Tensor | None],
    ) -> None:
        """Parameters are made on the ambient device (meta, until loaded).

        `linear` is the format of the blocks' weights; embeddings and head stay in `dtype`. `rotary`
        is as `rotary_tables` gives it.
        """
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.position_embedding: nn.Embedding | None = None
        if config.topology == "gpt2":
            self.position_embedding = nn.Embedding(
                config.max_position_embeddings, config.hidden_size, dtype=dtype
            )
        self.layers = nn.ModuleList(
            Layer(config, index, dtype, linear, table) for index, table in enumerate(rotary)
        )
        self.norm = _norm(config)
        self.head = FullLinear(config.hidden_size, config.vocab_size, dtype)
        # rounded as the rows that it multiplies
        self.embedding_scale = torch.tensor(
            config.embedding_scale, dtype=dtype, device="cpu"
        ).item()
        self.logit_softcap = config.logit_softcap
        self.is_tied = config.tie_word_embeddings
        if self.is_tied:
            self.head.weight = cast(nn.Parameter, self.embedding.weight)
        for module in self.modules():
            if isinstance(module, Norm) and not module.offset:
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
        scale = self.embedding_scale
        stream = ops.embed(self.embedding, self.position_embedding, step, scale)
        *layers, last = (cast(Layer, layer) for layer in self.layers)
        for layer in layers:
            stream = layer(ops, stream, step)
        return last(ops, stream, step, kept)  # type: ignore[no-any-return]

    def logits(self, ops: Ops[StepT, StreamT, InnerT], stream: StreamT) -> Tensor:
        """[rows, hidden] → [rows, vocabulary]."""
        logits = ops.logits(stream, self.norm, self.head)
        if self.logit_softcap is None:
            return logits
        return (logits / self.logit_softcap).tanh_().mul_(self.logit_softcap)


def _norm(config: ModelConfig) -> Norm:
    is_gpt2 = config.topology == "gpt2"
    kind: Literal["layer", "rms"] = "layer" if is_gpt2 else "rms"
    bias, offset = config.norm_bias, config.norm_offset
    return Norm(config.hidden_size, config.norm_eps, kind, bias=bias, offset=offset)
