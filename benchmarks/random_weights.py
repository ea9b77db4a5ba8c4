"""Checkpoints of random numbers, made on the device: speed without files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from nanoinfer_engine.core.config import ModelConfig, RopeConfig
from nanoinfer_engine.models import build_model, checkpoint_layout
from nanoinfer_engine.weights.checkpoints import Part
from torch import Tensor


class RandomCheckpoint:
    """Every tensor that `config` needs, drawn at each read from its name; norm gains are near 1.

    With `dummy` all are uniform within ±0.001, as vLLM's dummy loader draws them: the products of
    such numbers take less power, and a card at its power limit then computes faster.
    """

    num_shards = 1

    def __init__(
        self, config: ModelConfig, device: str, dtype: torch.dtype, *, dummy: bool = False
    ) -> None:
        self.config, self._dummy = config, dummy
        self._last = "", torch.empty(0)
        self._device, self._dtype = device, dtype
        model = build_model(config, 16, dtype, torch.device("cpu"))
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            f"{source.theirs}.{kind}": (source.rows or shape[0], *shape[1:])
            for source in checkpoint_layout(config).sources
            for kind in ("weight", "bias")
            if (shape := shapes.get(f"{source.ours}.{kind}")) is not None
        }

    def shard(self, name: str) -> int:
        return 0

    def read(self, name: str, part: Part | None = None) -> Tensor:
        if name != self._last[0]:
            self._last = name, self._draw(name)
        values = self._last[1]
        return values if part is None else values[part.region]

    def _draw(self, name: str) -> Tensor:
        shape = self.shapes[name]
        device = torch.empty(0, device=self._device).device  # the one that is current here
        source = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(shape, device=device, dtype=self._dtype, generator=source)
        if self._dummy:
            values.uniform_(-1e-3, 1e-3, generator=source)
        elif len(shape) == 1:
            values.mul_(0.05).add_(1)
        else:
            values.mul_(shape[-1] ** -0.5)
        return values


def _decoder(model_type: str, **sizes: int | bool | float) -> ModelConfig:
    num_layers = int(sizes["num_layers"])
    rope = RopeConfig(theta=float(sizes.pop("theta")))
    return ModelConfig(
        model_type=model_type,
        topology="decoder",
        max_position_embeddings=8192,
        norm_eps=1e-6,
        activation="silu",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        norm_bias=False,
        sliding_windows=(None,) * num_layers,
        rope=rope,
        **sizes,  # type: ignore[arg-type]
    )


SHAPES = {
    "0.6b": _decoder(
        "qwen3",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        qk_norm=True,
        theta=1e6,
    ),
    "8b": _decoder(
        "llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        qk_norm=False,
        theta=5e5,
    ),
    "tiny": _decoder(
        "llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        qk_norm=False,
        theta=1e4,
    ),
}
"""Qwen3-0.6B, Llama-3.1-8B, and one that any machine runs in a moment."""
