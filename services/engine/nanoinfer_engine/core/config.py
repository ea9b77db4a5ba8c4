"""Engine and model configuration as plain frozen data: no torch, no pydantic, no environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

WeightFormat = Literal["none", "fp8", "int8"]
"""Names of the formats in which the layers' weights may be kept; `ops.linear` has one for each."""

WEIGHT_FORMATS: Final[Mapping[WeightFormat, str]] = {
    "none": "in `dtype`",
    "fp8": "8-bit weights and activations, from Ada on, slow on CPUs",
    "int8": "8-bit weights alone, on any device",
}
"""What each means, as settings say it."""


class CheckpointError(Exception):
    """A checkpoint that cannot be served; the message names the field, tensor or file at fault."""


@dataclass(frozen=True)
class EngineConfig:
    """What the engine's core needs to know; built once by the entry point.

    `kv_cache_bytes` is the memory budget from which the number of blocks follows; None, on a CUDA
    device alone, takes what a trial of the largest step leaves of `device_memory_share`, the share
    of the device's memory that the engine may use. `block_size` is in tokens. `max_batch_tokens`
    and `max_batch_requests` bound one step, `max_mixed_tokens` one in which somebody decodes (None:
    no further), `max_waiting_requests`, `max_waiting_tokens` (prompt tokens) and
    `max_waiting_bytes` the queue; `max_queue_seconds` how long a request may wait to
    start, None for as long as its deadline. `prefix_caching` keeps full blocks for later prompts.
    `max_model_len` None means what the model allows. `dtype` "auto" is the checkpoint's own on a
    CUDA device and float32 elsewhere, see `number_formats`. `quantization` is the format of the
    layers' weights; `kv_cache_dtype` "fp8" keeps the cache in 8 bits, "auto" in `dtype`. With
    `tensor_parallel` above 1 so many devices share the model, and memory is what each of them has.
    With `mixed_graphs` small steps with prompts are captured on one CUDA device, not decodes alone.
    `max_messages_per_second` bounds what all streams send, besides first and last outputs.
    """

    model_path: Path
    device: str = "cpu"
    dtype: str = "float32"
    num_threads: int | None = None
    kv_cache_bytes: int | None = 256 * 1024 * 1024
    device_memory_share: float = 0.9
    block_size: int = 16
    max_model_len: int | None = None
    max_batch_tokens: int = 512
    max_batch_requests: int = 64
    max_mixed_tokens: int | None = None
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1_000_000
    max_waiting_bytes: int = 64 * 1024 * 1024
    max_queue_seconds: float | None = None
    prefix_caching: bool = True
    quantization: WeightFormat = "none"
    kv_cache_dtype: str = "auto"
    tensor_parallel: int = 1
    mixed_graphs: bool = True
    max_messages_per_second: int = 5000

    @property
    def number_format(self) -> str:
        """What is computed with, and what is kept in fewer bits, such as `float16+fp8`."""
        weights = "" if self.quantization == "none" else f"+{self.quantization}"
        cache = "" if self.kv_cache_dtype == "auto" else f"+kv_{self.kv_cache_dtype}"
        return self.dtype + weights + cache

    @property
    def mixed_step_tokens(self) -> int:
        """Most tokens of a step in which somebody decodes."""
        mixed = self.max_batch_tokens if self.max_mixed_tokens is None else self.max_mixed_tokens
        return min(mixed, self.max_batch_tokens)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864): base frequency and context extension.

    `kind` is "default", "linear" (positions divided by `factor`) or "llama3" (low frequencies
    divided by `factor`, high ones kept, a ramp between; thresholds relative to
    `original_max_position_embeddings`).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """Radians a position turns each of the head's `head_dim / 2` planes by."""
        plain = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "linear":
            return [frequency / self.factor for frequency in plain]
        if self.kind == "llama3":
            return [self._llama3(frequency) for frequency in plain]
        return plain

    def _llama3(self, frequency: float) -> float:
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        # 0 where the plane turns fewer than `low` times over the original context, 1 above `high`
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class ModelConfig:
    """A model's architecture; every field resolved, consistent with the others once constructed.

    `topology` is "decoder" (Llama family: RMSNorm, RoPE, gated MLP) or "gpt2" (LayerNorm, learned
    positions, plain MLP). `sliding_windows` has one entry per layer: the number of last positions
    a token sees, itself included, or None for all. `activation` is "silu" ("decoder" alone), "gelu"
    (exact) or "gelu_tanh" (its approximation). `rope` is unused by "gpt2"; layers with a window
    have `local_rope`, where there is one. `norm_offset` is added to stored weights of norms. With
    `post_norms` what attention and MLP give is normalised before it joins the stream.
    `attention_scale` None is 1/sqrt(head_dim). A soft cap c makes c · tanh(x / c) of each x.
    `unread_fields` are fields of the description that have no effect. Raises CheckpointError where
    fields contradict.
    """

    model_type: str
    topology: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    activation: str
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    norm_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope: RopeConfig
    local_rope: RopeConfig | None = None
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    post_norms: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    unread_fields: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check what no single field shows."""
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_heads} is not a multiple of"
                f" num_key_value_heads {self.num_kv_heads}"
            )
        if self.topology == "decoder" and self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: RoPE turns pairs")
        if len(self.sliding_windows) != self.num_layers:
            raise CheckpointError(
                f"layer_types has {len(self.sliding_windows)} entries"
                f" for num_hidden_layers {self.num_layers}"
            )
