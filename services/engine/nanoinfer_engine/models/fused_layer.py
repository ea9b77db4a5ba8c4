"""What `fused` runs: a layer of the plain decoder as its products, and what goes in and out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models.decoder import Decoder, Layer
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.ops.cuda.kernels.heads import HeadTransform
from nanoinfer_engine.ops.cuda.linears import Linear
from nanoinfer_engine.ops.quantization import Fp8Linear

MAX_FUSED_NORM = 2048
"""Hidden sizes up to which a GEMV takes the norm before it in: beyond, its registers cost more."""


@dataclass(frozen=True)
class StepTokens:
    """[tokens] int32 ids; where `sources` is not negative, `sampled[source]` is the id instead."""

    token_ids: Tensor
    sources: Tensor
    sampled: Tensor


@dataclass(frozen=True)
class Hidden:
    """The residual stream [tokens, hidden] and parts still to be added, [parts, tokens, hidden]."""

    residual: Tensor
    delta: Tensor | None

    def select(self, tokens: Tensor) -> Hidden:
        """Copies of some tokens' rows."""
        delta = None if self.delta is None else self.delta.index_select(1, tokens)
        return Hidden(self.residual.index_select(0, tokens), delta)


@dataclass(frozen=True)
class FusedLayer:
    """One layer's weights, named by what they are multiplied for."""

    products: dict[str, Linear]
    attention_gain: Tensor
    mlp_gain: Tensor
    transform: HeadTransform


def fused_layer(layer: Layer, model: Decoder, config: ModelConfig, rank: Rank) -> FusedLayer:
    """The products of a loaded layer; its weights are shared, not copied."""
    attention, mlp = layer.attention, layer.mlp
    fuses = config.hidden_size <= MAX_FUSED_NORM and rank.size == 1
    ends = [linear.bias is None and rank.size == 1 for linear in (attention.output, mlp.down)]
    gains = [norm.weight if fuses else None for norm in (layer.attention_norm, layer.mlp_norm)]
    output, down = attention.output, mlp.down
    products = {
        "qkv": _linear(attention.qkv, gain=gains[0]),
        "output": _linear(output, joins=ends[0]),
        "gate_up": _linear(mlp.gate_up, gated=True, activation=config.activation, gain=gains[1]),
        "down": _linear(down, joins=ends[1]),
    }
    norms = attention.query_norm, attention.key_norm
    head_gains = [None if norm is None else norm.weight for norm in norms]
    transform = HeadTransform(model.rotary, head_gains[0], head_gains[1], config.norm_eps)
    return FusedLayer(products, layer.attention_norm.weight, layer.mlp_norm.weight, transform)


def _linear(
    module: nn.Linear | Fp8Linear,
    *,
    gated: bool = False,
    activation: str = "silu",
    joins: bool = False,
    gain: Tensor | None = None,
) -> Linear:
    scale = module.scale if isinstance(module, Fp8Linear) else None
    return Linear(module.weight, module.bias, scale, gated, activation, joins, gain)
