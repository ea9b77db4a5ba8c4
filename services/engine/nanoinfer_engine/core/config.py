"""Engine and model configuration as plain frozen data: no torch, no pydantic, no environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from nanoinfer_engine.core.settings import described, setting, setting_of

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
    """Settings of the engine's core, declared here alone: each field is a flag of the service.

    `from_settings` builds it of the values that an operator gave. Built directly, a field that is
    left out takes its default on a CPU.
    """

    model_path: Path = field(
        metadata=described("Model directory, or a .pt checkpoint.", flag="model")
    )
    device: str = setting("cpu", "Device to run on: `cpu`, or `cuda` with Triton.")
    dtype: str = setting(
        "auto",
        "Number format of the computation. On CUDA `auto` is the checkpoint's own: float16 or"
        " bfloat16, and bfloat16 for a float32 one; on a CPU it is float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = setting(
        "none",
        "Format of the layers' weights: "
        + "; ".join(f"`{name}`, {meaning}" for name, meaning in WEIGHT_FORMATS.items())
        + ".",
        choices=tuple(WEIGHT_FORMATS),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Number format of the KV cache; `fp8` holds twice the tokens.",
        choices=("auto", "fp8"),
    )
    tensor_parallel: int = setting(
        1, "Devices that share the model; threads and memory are each one's.", ge=1
    )
    num_threads: int | None = setting(
        None,
        "Threads of a step on the CPU; as many as affinity and the control group's CPU quota"
        " allow.",
        flag="threads",
        ge=1,
        le=1024,
    )
    kv_cache_bytes: int | None = setting(
        256 * 1024**2,
        "Memory for the KV cache; 256MiB, or on CUDA what is left of the device's.",
        flag="kv_cache_memory",
        in_bytes=True,
        gt=0,
        on_cuda=None,
    )
    device_memory_share: float = setting(
        0.9, "Share of a CUDA device to use, without kv_cache_memory.", gt=0, le=1
    )
    block_size: int = setting(16, "Tokens per block of the KV cache.", ge=1, le=1024)
    max_model_len: int | None = setting(
        None, "Most tokens of prompt and completion; what the model allows.", ge=2
    )
    max_batch_tokens: int = setting(
        512, "Most tokens computed in one step; 8192 on CUDA, else 512.", ge=1, on_cuda=8192
    )
    max_batch_requests: int = setting(
        64, "Most completions in one step; 256 on CUDA, else 64.", ge=1, on_cuda=256
    )
    max_mixed_tokens: int | None = setting(
        None,
        "Most tokens of a step in which somebody decodes: the smaller, the steadier are streams"
        " beside long prompts; 2048 on CUDA, else max_batch_tokens.",
        ge=1,
        on_cuda=2048,
    )
    max_waiting_requests: int = setting(256, "Most completions in the queue.", ge=1)
    max_waiting_tokens: int = setting(1_000_000, "Most prompt tokens in the queue.", ge=1)
    max_waiting_bytes: int = setting(
        64 * 1024**2, "Most memory of the requests in the queue.", in_bytes=True, gt=0
    )
    max_queue_seconds: float | None = setting(
        None, "Longest wait for a first step; `none` leaves it to the deadline.", gt=0
    )
    prefix_caching: bool = setting(
        True, "Reuse the KV cache of prompts that begin alike, within a tenant."
    )
    mixed_graphs: bool = setting(
        True, "On one CUDA device small steps with prompts run as graphs, too."
    )
    max_messages_per_second: int = setting(
        5000,
        "Most messages sent in a second, all streams together, besides their first and last:"
        " with more tokens than that, several share one.",
        ge=1,
    )

    @classmethod
    def from_settings(cls, given: Mapping[str, Any]) -> EngineConfig:
        """Configuration of values by field; None leaves a field to its default on the device."""
        values = {name: value for name, value in given.items() if value is not None}
        if not str(values.get("device", "")).startswith("cuda"):
            return cls(**values)
        declared = {each.name: setting_of(each) for each in fields(cls)}
        defaults = {n: each.on_cuda for n, each in declared.items() if each.follows_device}
        config = cls(**(defaults | values))
        if "max_mixed_tokens" in values:
            return config
        # a default gives way to what is asked for beside it
        mixed = max(defaults["max_mixed_tokens"], config.max_batch_requests)
        return replace(config, max_mixed_tokens=min(mixed, config.max_batch_tokens))

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
