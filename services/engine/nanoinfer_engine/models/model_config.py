"""Foreign model descriptions → `ModelConfig`: Hugging Face config.json and nanoGPT arguments.

Knows no tensors. Each family is read by its row in `families`; what the decoder cannot compute is
refused with the field's name, and nothing that would change a result is passed over in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoinfer_common.json_files import JsonFileError, read_object

from nanoinfer_engine.core.config import CheckpointError, ModelConfig, RopeConfig
from nanoinfer_engine.models.families import FAMILIES, HARMLESS, REQUIRED, Family

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_HEADS = 4096
MAX_VOCAB = 1 << 22
MAX_POSITIONS = 1 << 24

_ROPE_FIELDS = frozenset(
    (
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    )
)


class Fields:
    """Typed, bounded reading of a mapping; every refusal names the field and its value.

    An absent field has the default of `defaults`; null is a value of its own, as it is in the
    configuration classes, and fits only a field whose default it is or that says so.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        """`where` is the file or section that the error messages name."""
        self._values = values
        self._where = where
        self._defaults = defaults or {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """The value, the default where absent."""
        value = self._values.get(name, self._defaults.get(name))
        return None if value is REQUIRED else value

    def names(self) -> list[str]:
        """The fields that are there."""
        return [str(name) for name in self._values]

    def refuse(self, name: str, wanted: str) -> CheckpointError:
        """The error that says what was wanted of `name`."""
        value = repr(self.get(name))[:80]
        return CheckpointError(f"{self._where}: {name} is {value}, {wanted}")

    def integer(self, name: str, maximum: int, minimum: int = 1) -> int:
        """An integer in [minimum, maximum]."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.refuse(name, f"must be an integer in {minimum} … {maximum}")
        return value

    def integer_or(self, name: str, maximum: int, other: int) -> int:
        """An integer in [1, maximum]; `other` where null."""
        return other if self.get(name) is None else self.integer(name, maximum)

    def number(self, name: str) -> float:
        """A finite number above zero."""
        value = self.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(name, "must be a number")
        if not math.isfinite(value) or value <= 0:
            raise self.refuse(name, "must be finite and above 0")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """A finite number above zero; None where null."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """A boolean."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """What `choices` has for the value."""
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(name, f"supported: {', '.join(choices)}")
        return choices[value]

    def fixed(self, name: str, accepted: tuple[Any, ...]) -> None:
        """Refuse any value but those; absent is fine."""
        if name in self and self._values[name] not in accepted:
            supported = ", ".join(repr(each) for each in accepted if each is not None)
            raise self.refuse(name, f"supported: {supported or 'none, the field must be absent'}")


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; raises CheckpointError naming the file."""
    try:
        return read_object(path)
    except JsonFileError as error:
        raise CheckpointError(str(error)) from error


def read_huggingface_config(directory: Path) -> ModelConfig:
    """`config.json` of a Hugging Face directory."""
    values = read_json(directory / "config.json")
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        wanted = f"supported: {', '.join(FAMILIES)}"
        raise Fields(values, "config.json").refuse("model_type", wanted)
    fields = Fields(_unaliased(values, family), "config.json", family.fields)
    for name, accepted in family.fixed.items():
        fields.fixed(name, accepted)
    if family.topology == "gpt2":
        return _gpt2(fields, family)
    return _decoder(fields, family, str(model_type))


def nanogpt_config(arguments: Mapping[str, Any]) -> ModelConfig:
    """The `model_args` of a nanoGPT-style checkpoint (exact GELU, tied embeddings)."""
    defaults = {"bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    fields = Fields(arguments, "model_args", defaults)
    hidden = fields.integer("n_embd", MAX_WIDTH)
    known = {*defaults, "vocab_size", "n_embd", "n_head", "n_layer", "block_size", "dropout"}
    return _gpt2_config(
        fields,
        "nanogpt",
        4 * hidden,
        fields.integer("block_size", MAX_POSITIONS),
        "gelu",
        fields.flag("bias"),
        tuple(sorted(set(fields.names()) - known)),
    )


def _unaliased(values: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The fields under the names of the row; CheckpointError where two names contradict."""
    plain = dict(values)
    for alias, name in family.aliases.items():
        if alias in plain:
            value = plain.pop(alias)
            if plain.setdefault(name, value) != value:
                raise Fields(values, "config.json").refuse(alias, f"but {name} says another")
    return plain


def _unread(fields: Fields, family: Family) -> tuple[str, ...]:
    """The fields without effect in this family that may have been meant to have one."""
    return tuple(sorted({*fields.names()} - {*family.fields, *family.fixed} - HARMLESS))


def _gpt2(fields: Fields, family: Family) -> ModelConfig:
    return _gpt2_config(
        fields,
        "gpt2",
        fields.integer_or("n_inner", MAX_WIDTH, 4 * fields.integer("n_embd", MAX_WIDTH)),
        fields.integer("n_positions", MAX_POSITIONS),
        fields.choice("activation_function", family.activations),
        True,
        _unread(fields, family),
    )


def _gpt2_config(
    fields: Fields,
    model_type: str,
    intermediate_size: int,
    max_position_embeddings: int,
    activation: str,
    bias: bool,
    unread: tuple[str, ...],
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
        norm_eps=fields.number("layer_norm_epsilon"),
        activation=activation,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_bias=bias,
        qk_norm=False,
        sliding_windows=(None,) * layers,
        rope=RopeConfig(),
        unread_fields=unread,
    )


def _decoder(fields: Fields, family: Family, model_type: str) -> ModelConfig:
    hidden = fields.integer("hidden_size", MAX_WIDTH)
    heads = fields.integer("num_attention_heads", MAX_HEADS)
    layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.refuse("hidden_size", f"must be a multiple of num_attention_heads {heads}")
    rope, local_rope, unread_rope = _ropes(fields, family)

    def known(name: str) -> float | None:
        return fields.number_or_none(name) if name in family.fields else None

    scalar = known("query_pre_attn_scalar")

    def has_bias(rule: bool | str) -> bool:
        return fields.flag(rule) if isinstance(rule, str) else rule

    return ModelConfig(
        model_type=model_type,
        topology=family.topology,
        vocab_size=fields.integer("vocab_size", MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", MAX_WIDTH),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer_or("num_key_value_heads", MAX_HEADS, heads),
        head_dim=fields.integer_or("head_dim", MAX_WIDTH, hidden // heads),
        max_position_embeddings=fields.integer("max_position_embeddings", MAX_POSITIONS),
        norm_eps=fields.number("rms_norm_eps"),
        activation=fields.choice(family.activation, family.activations),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=has_bias(family.qkv_bias),
        output_bias=has_bias(family.output_bias),
        mlp_bias=has_bias(family.mlp_bias),
        norm_bias=False,
        qk_norm=family.qk_norm,
        sliding_windows=_sliding_windows(fields, family, layers),
        rope=rope,
        local_rope=local_rope,
        embedding_scale=math.sqrt(hidden) if family.scales_embedding else 1.0,
        norm_offset=family.norm_offset,
        post_norms=family.post_norms,
        attention_scale=None if scalar is None else scalar**-0.5,
        attention_softcap=known("attn_logit_softcapping"),
        logit_softcap=known("final_logit_softcapping"),
        unread_fields=_unread(fields, family) + unread_rope,
    )


def _sliding_windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Per layer, as the row's `windows` says."""
    if family.windows == "none":
        return (None,) * num_layers
    used = family.windows != "layers" or fields.flag("use_sliding_window")
    used = used and fields.get("sliding_window") is not None
    window = fields.integer("sliding_window", MAX_POSITIONS) if used else None
    if family.windows == "all":
        return (window,) * num_layers
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
            raise fields.refuse("layer_types", f"each must be one of {', '.join(known)}")
        if window is None and "sliding_attention" in kinds:
            wanted = "and use_sliding_window may be false, but layer_types has sliding_attention"
            raise fields.refuse("sliding_window", wanted)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family.windows == "pattern":
        every = family.window_pattern
        period = fields.integer(every, MAX_LAYERS) if isinstance(every, str) else every
        if window is None and period > 1:
            raise fields.refuse("sliding_window", "but layers have one")
        return tuple(window if (layer + 1) % period else None for layer in range(num_layers))
    # the first `max_window_layers` layers see everything
    first = fields.integer("max_window_layers", MAX_LAYERS, 0)
    return tuple(None if layer < first else window for layer in range(num_layers))


def _ropes(fields: Fields, family: Family) -> tuple[RopeConfig, RopeConfig | None, tuple[str, ...]]:
    """The position embedding, that of layers with a window, and the fields without effect."""
    if family.local_rope:
        return _ropes_by_layer(fields, family)
    # `rope_scaling`, where it is not empty, takes the place of `rope_parameters`
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    values = fields.get(name) or {}
    if not isinstance(values, Mapping):
        raise fields.refuse(name, "must be an object")
    section, kind = _rope_section(fields, family, values, name, fields.get("rope_theta"))
    for each, value in values.items():
        if isinstance(value, Mapping):
            raise section.refuse(each, "but position embeddings per kind of layer are unsupported")
    _check_replaced(fields, section, name)
    return _rope_config(section, kind), None, _unread_rope(values, name)


def _ropes_by_layer(
    fields: Fields, family: Family
) -> tuple[RopeConfig, RopeConfig, tuple[str, ...]]:
    """As `_ropes`, of a section for each kind of layer; `rope_scaling` changes the full one's."""
    both = fields.get("rope_parameters")
    if both is None:
        both = {}
    kinds = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    if not isinstance(both, Mapping) or not set(both) <= set(kinds):
        raise fields.refuse("rope_parameters", f"must be an object of {', '.join(kinds)}")
    ropes: list[RopeConfig] = []
    unread: tuple[str, ...] = ()
    for layer_kind, theta in kinds.items():
        name = f"rope_parameters.{layer_kind}"
        values = {"rope_type": "default"} if both.get(layer_kind) is None else both[layer_kind]
        scaling = fields.get("rope_scaling") if layer_kind == "full_attention" else None
        scaling = {} if scaling is None else scaling
        for each in (values, scaling):
            if not isinstance(each, Mapping):
                raise fields.refuse("rope_parameters", f"{layer_kind} must be an object")
        values = {**values, **scaling}
        section, kind = _rope_section(fields, family, values, name, fields.get(theta))
        ropes.append(_rope_config(section, kind))
        unread += _unread_rope(values, name)
    return ropes[0], ropes[1], unread


def _rope_section(
    fields: Fields, family: Family, values: Mapping[str, Any], name: str, theta: Any
) -> tuple[Fields, str]:
    """A section and its kind; what is not in it comes from the fields beside it.

    Of these `original_max_position_embeddings` goes first.
    """
    original = fields.get("original_max_position_embeddings")
    if original is None:
        original = values.get(
            "original_max_position_embeddings", fields.get("max_position_embeddings")
        )
    values = {"rope_theta": theta, **values}
    kind_name = "rope_type" if "rope_type" in values else "type"
    section = Fields(
        {**values, "original_max_position_embeddings": original},
        f"config.json: {name}",
        {"type": "default"},
    )
    kind = section.choice(kind_name, {each: each for each in family.rope_kinds})
    section.fixed("partial_rotary_factor", (None, 1))
    return section, kind


def _unread_rope(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(f"{name}.{each}" for each in sorted(set(values) - _ROPE_FIELDS))


def _check_replaced(fields: Fields, section: Fields, name: str) -> None:
    """Refuse a `rope_scaling` that by replacing `rope_parameters` loses another `rope_theta`."""
    replaced = fields.get("rope_parameters")
    if name != "rope_scaling" or not isinstance(replaced, Mapping):
        return
    theta = replaced.get("rope_theta", section.get("rope_theta"))
    if theta != section.get("rope_theta"):
        wanted = (
            f"but rope_parameters, which rope_scaling replaces, says {theta}: write one of the two"
        )
        raise section.refuse("rope_theta", wanted)


def _rope_config(section: Fields, kind: str) -> RopeConfig:
    theta = section.number("rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=section.number("factor"))
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.refuse("high_freq_factor", f"must exceed low_freq_factor {low}")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=section.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=section.integer(
            "original_max_position_embeddings", MAX_POSITIONS
        ),
    )
