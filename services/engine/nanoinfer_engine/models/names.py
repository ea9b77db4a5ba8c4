"""Names of checkpoint tensors by family, and the modules of the decoder that they fill.

A fused parameter (query, key and value; gate and up) is the concatenation of its parts' rows, in
the order in which a table lists them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanoinfer_engine.core.config import ModelConfig


@dataclass(frozen=True)
class ModuleSource:
    """One module of the checkpoint and the module of ours that holds its weight and bias.

    `rows` is how many rows of ours it fills, None for all. `transposed` weights are stored
    [in, out].
    """

    theirs: str
    ours: str
    rows: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class CheckpointLayout:
    """A model's sources, the prefix its names may carry, and the names that hold no weights."""

    sources: tuple[ModuleSource, ...]
    prefix: str
    ignored: re.Pattern[str]
    tied: tuple[str, str] | None = None
    """(name, parameter): a tensor that may be stored again and must then equal the parameter."""


# (checkpoint module, our module, part of ours) within a layer; parts in row order
_Names = tuple[tuple[str, str, str | None], ...]

_SPLIT: _Names = (
    ("self_attn.q_proj", "qkv", "query"),
    ("self_attn.k_proj", "qkv", "key"),
    ("self_attn.v_proj", "qkv", "value"),
    ("mlp.gate_proj", "up", "mlp"),
    ("mlp.up_proj", "up", "mlp"),
)
_FUSED: _Names = (("self_attn.qkv_proj", "qkv", None), ("mlp.gate_up_proj", "up", None))
_COMMON: _Names = (
    ("input_layernorm", "attention_norm", None),
    ("self_attn.o_proj", "output", None),
    ("mlp.down_proj", "down", None),
)
_PRE_NORMS: _Names = (("post_attention_layernorm", "mlp_norm", None),)
_PRE_AND_POST_NORMS: _Names = (
    ("post_attention_layernorm", "attention_post_norm", None),
    ("pre_feedforward_layernorm", "mlp_norm", None),
    ("post_feedforward_layernorm", "mlp_post_norm", None),
)
_HEAD_NORMS: _Names = (
    ("self_attn.q_norm", "query_norm", None),
    ("self_attn.k_norm", "key_norm", None),
)
_GPT2: _Names = (
    ("ln_1", "attention_norm", None),
    ("attn.c_attn", "qkv", None),
    ("attn.c_proj", "output", None),
    ("ln_2", "mlp_norm", None),
    ("mlp.c_fc", "up", None),
    ("mlp.c_proj", "down", None),
)


def checkpoint_layout(config: ModelConfig) -> CheckpointLayout:
    """The names in a checkpoint of this architecture (Hugging Face, or nanoGPT for its own)."""
    tied = ("lm_head.weight", "embedding.weight") if config.tie_word_embeddings else None
    head = () if config.tie_word_embeddings else (ModuleSource("lm_head", "head"),)
    if config.topology == "gpt2":
        outer = (("wte", "embedding"), ("wpe", "position_embedding"), ("ln_f", "norm"))
        # Hugging Face stores GPT-2's linears as [in, out]; masks are buffers of older versions
        layers = _layers(config, "h", _GPT2, transposed=config.model_type == "gpt2")
        sources = *(ModuleSource(*names) for names in outer), *layers, *head
        ignored = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
        return CheckpointLayout(sources, "transformer.", ignored, tied)
    # Phi-3 stores its linears fused
    table = _COMMON + (_FUSED if config.model_type == "phi3" else _SPLIT)
    table += _PRE_AND_POST_NORMS if config.post_norms else _PRE_NORMS
    table += _HEAD_NORMS if config.qk_norm else ()
    ends = (ModuleSource("embed_tokens", "embedding"), ModuleSource("norm", "norm"), *head)
    sources = *ends, *_layers(config, "layers", table)
    ignored = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
    return CheckpointLayout(sources, "model.", ignored, tied)


def _layers(
    config: ModelConfig, prefix: str, table: _Names, *, transposed: bool = False
) -> tuple[ModuleSource, ...]:
    rows = {
        "query": config.num_heads * config.head_dim,
        "key": config.num_kv_heads * config.head_dim,
        "value": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
    }
    return tuple(
        ModuleSource(
            f"{prefix}.{layer}.{theirs}",
            f"layers.{layer}.{ours}",
            None if part is None else rows[part],
            transposed,
        )
        for layer in range(config.num_layers)
        for theirs, ours, part in table
    )
