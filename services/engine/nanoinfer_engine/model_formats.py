"""Foreign model descriptions → `ModelConfig`: Hugging Face config.json and nanoGPT arguments.

Knows no tensors. What the decoder cannot compute is refused with the field's name; nothing that
would change a result is passed over in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoinfer_engine.config import CheckpointError, ModelConfig, RopeConfig

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_HEADS = 4096
MAX_VOCAB = 1 << 22
MAX_POSITIONS = 1 << 24
MAX_JSON_BYTES = 64 * 1024 * 1024

_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_GATE_ACTIVATIONS = {"silu": "silu", "swish": "silu", **_GPT2_ACTIVATIONS}
_LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "phi3")


class Fields:
    """Typed, bounded reading of a mapping; every refusal names the field and its value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """`where` is the file or section that the error messages name."""
        self._values = values
        self._where = where

    def get(self, name: str) -> Any:
        """The raw value, None where absent."""
        return self._values.get(name)

    def refuse(self, name: str, wanted: str) -> CheckpointError:
        """The error that says what was wanted of `name`."""
        value = repr(self.get(name))[:80]
        return CheckpointError(f"{self._where}: {name} is {value}, {wanted}")

    def integer(self, name: str, maximum: int, default: int | None = None) -> int:
        """An integer in [1, maximum]; `default` where absent or null."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
            raise self.refuse(name, f"must be an integer in 1 … {maximum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero; `default` where absent or null."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(name, "must be a number")
        if not math.isfinite(value) or value <= 0:
            raise self.refuse(name, "must be finite and above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; `default` where absent or null."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return value

    def section(self, name: str) -> Fields | None:
        """A nested mapping, None where absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(name, "must be an object")
        return Fields(value, f"{self._where}: {name}")

    def only(self, name: str, *accepted: Any) -> None:
        """Refuse any value but those; absent and null are fine."""
        if self.get(name) is not None and self.get(name) not in accepted:
            raise self.refuse(name, f"supported: {', '.join(map(repr, accepted)) or 'none'}")


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name}: larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: not a JSON object")
    return value


def read_huggingface_config(directory: Path) -> ModelConfig:
    """`config.json` (and the EOS ids of `generation_config.json`) of a Hugging Face directory."""
    fields = Fields(read_json(directory / "config.json"), "config.json")
    generation = directory / "generation_config.json"
    eos = Fields(read_json(generation), generation.name) if generation.exists() else fields
    eos_token_ids = _token_ids(eos) or _token_ids(fields)
    if fields.get("quantization_config") is not None:
        raise fields.refuse("quantization_config", "quantised checkpoints are not supported")
    model_type = fields.get("model_type")
    if model_type == "gpt2":
        return _gpt2(fields, eos_token_ids)
    if model_type in _LLAMA_FAMILY:
        return _llama_family(fields, model_type, eos_token_ids)
    raise fields.refuse("model_type", f"supported: gpt2, {', '.join(_LLAMA_FAMILY)}")


def nanogpt_config(arguments: Mapping[str, Any]) -> ModelConfig:
    """The `model_args` of a nanoGPT-style checkpoint (exact GELU, tied embeddings, no EOS)."""
    fields = Fields(arguments, "model_args")
    bias = fields.flag("bias", default=True)
    hidden = fields.integer("n_embd", MAX_WIDTH)
    return _gpt2_config(
        fields, "nanogpt", 4 * hidden, fields.integer("block_size", MAX_POSITIONS), "gelu", bias, ()
    )


def _token_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise fields.refuse("eos_token_id", "must be an integer or a list of integers")
    return tuple(values)


def _gpt2(fields: Fields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    fields.only("activation_function", *_GPT2_ACTIVATIONS)
    hidden = fields.integer("n_embd", MAX_WIDTH)
    return _gpt2_config(
        fields,
        "gpt2",
        fields.integer("n_inner", MAX_WIDTH, default=4 * hidden),
        fields.integer("n_positions", MAX_POSITIONS),
        _GPT2_ACTIVATIONS[fields.get("activation_function") or "gelu_new"],
        True,
        eos_token_ids,
    )


def _gpt2_config(
    fields: Fields,
    model_type: str,
    intermediate_size: int,
    max_position_embeddings: int,
    activation: str,
    bias: bool,
    eos_token_ids: tuple[int, ...],
) -> ModelConfig:
    hidden = fields.integer("n_embd", MAX_WIDTH)
    heads = fields.integer("n_head", MAX_HEADS)
    layers = fields.integer("n_layer", MAX_LAYERS)
    if hidden % heads:
        raise fields.refuse("n_embd", f"must be a multiple of n_head {heads}")
    return ModelConfig(
        model_type=model_type,
        topology="gpt2",
        vocab_size=fields.integer("vocab_size", MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=intermediate_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=max_position_embeddings,
        norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
        activation=activation,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_bias=bias,
        qk_norm=False,
        sliding_windows=(None,) * layers,
        rope=RopeConfig(),
        eos_token_ids=eos_token_ids,
    )


def _llama_family(fields: Fields, model_type: str, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    fields.only("hidden_act", *_GATE_ACTIVATIONS)
    hidden = fields.integer("hidden_size", MAX_WIDTH)
    heads = fields.integer("num_attention_heads", MAX_HEADS)
    layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.refuse("hidden_size", f"must be a multiple of num_attention_heads {heads}")
    attention_bias = fields.flag("attention_bias", default=False)
    max_positions = fields.integer("max_position_embeddings", MAX_POSITIONS)
    return ModelConfig(
        model_type=model_type,
        topology="decoder",
        vocab_size=fields.integer("vocab_size", MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", MAX_WIDTH),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", MAX_HEADS, default=heads),
        head_dim=fields.integer("head_dim", MAX_WIDTH, default=hidden // heads),
        max_position_embeddings=max_positions,
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        activation=_GATE_ACTIVATIONS[fields.get("hidden_act") or "silu"],
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=model_type != "qwen2" and attention_bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
        norm_bias=False,
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(fields, model_type, layers),
        rope=_rope(fields, max_positions),
        eos_token_ids=eos_token_ids,
    )


def _sliding_windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Per layer: from `layer_types`, or from the older fields of Mistral, Phi-3 and Qwen."""
    qwen = model_type in ("qwen2", "qwen3")
    used = fields.get("sliding_window") is not None
    used = used and (not qwen or fields.flag("use_sliding_window", default=False))
    window = fields.integer("sliding_window", MAX_POSITIONS) if used else None
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
            raise fields.refuse("layer_types", f"each must be one of {', '.join(known)}")
        if window is None and "sliding_attention" in kinds:
            raise fields.refuse("sliding_window", "but layer_types has sliding_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    # Qwen's first `max_window_layers` layers see everything
    first = fields.get("max_window_layers") if qwen and used else 0
    if not isinstance(first, int) or not 0 <= first <= MAX_LAYERS:
        raise fields.refuse("max_window_layers", f"must be an integer in 0 … {MAX_LAYERS}")
    return tuple(None if layer < first else window for layer in range(num_layers))


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    fields.only("partial_rotary_factor", 1, 1.0)
    scaling = fields.section("rope_parameters") or fields.section("rope_scaling")
    if scaling is None:
        return RopeConfig(theta=fields.number("rope_theta", default=10_000.0))
    theta = scaling.number("rope_theta", default=fields.number("rope_theta", default=10_000.0))
    name = "rope_type" if scaling.get("rope_type") is not None else "type"
    scaling.only(name, "default", "linear", "llama3")
    scaling.only("partial_rotary_factor", 1, 1.0)
    for layer_type in ("full_attention", "sliding_attention"):
        scaling.only(layer_type)
    kind = scaling.get(name) or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=scaling.number("factor"))
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.refuse("high_freq_factor", f"must exceed low_freq_factor {low}")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=scaling.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=scaling.integer(
            "original_max_position_embeddings", MAX_POSITIONS, default=max_positions
        ),
    )
