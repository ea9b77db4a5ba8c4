"""One row for each architecture family: what of a config.json means something, and its defaults.

A row says what the family's own configuration class in transformers reads. A field outside its row
changes nothing there, so it changes nothing here; it is listed at start, unless it is known to
describe no computation. A field that would change what is computed, and that the decoder does not
know, stands among the fixed ones: any other value is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final


class Required:
    """The default of a field that must be there: no size is guessed."""


REQUIRED: Final = Required()

_GELUS: Final = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_GATES: Final = {"silu": "silu", "swish": "silu", **_GELUS}


@dataclass(frozen=True)
class Family:
    """How one family's configuration is read.

    `fields` are those that its class reads, with the class's own defaults for absent ones. `fixed`
    are fields that allow the given values alone; absent is fine. `aliases` are other names of a
    field, which override it. `qkv_bias`, `output_bias` and `mlp_bias` are what is always so, or the
    field that says it. `windows` says which layers see the last `sliding_window` positions alone:
    "none", "all", "layers": those that `layer_types` or `max_window_layers` name, where
    `use_sliding_window` is true, or "pattern": those that `layer_types` names, else all but every
    n-th, n being `window_pattern` or the field that says it. `rope_kinds` are the position
    embeddings that the family knows; with `local_rope` layers with a window have one of their own.
    `activation` is the field that names the MLP's. `norm_offset`, `post_norms` and `qk_norm` are as
    in `ModelConfig`. With `scales_embedding` embeddings are multiplied by the root of their width.
    """

    topology: str
    fields: Mapping[str, Any]
    activations: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: str = "none"
    window_pattern: int | str = 1
    rope_kinds: tuple[str, ...] = ()
    local_rope: bool = False
    activation: str = "hidden_act"
    norm_offset: float = 0.0
    post_norms: bool = False
    scales_embedding: bool = False


# every mask of transformers looks at is_causal, whatever the family's class reads
_FIXED: Final[Mapping[str, tuple[Any, ...]]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
}
_ROTARY_FIXED: Final[Mapping[str, tuple[Any, ...]]] = {**_FIXED, "partial_rotary_factor": (None, 1)}
_ROPE_KINDS: Final = ("default", "linear", "llama3")

_DECODER: Final = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
}
_QWEN: Final = {
    **_DECODER,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

_GEMMA: Final = {
    **{name: value for name, value in _DECODER.items() if name != "hidden_act"},
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA_FIXED: Final = {**_ROTARY_FIXED, "use_bidirectional_attention": (None, False)}

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "gpt2": Family(
            topology="gpt2",
            fields={
                "vocab_size": REQUIRED,
                "n_positions": 1024,
                "n_embd": REQUIRED,
                "n_layer": REQUIRED,
                "n_head": REQUIRED,
                "n_inner": None,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "tie_word_embeddings": True,
            },
            activations=_GELUS,
            fixed={
                **_FIXED,
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
            },
            aliases={
                "hidden_size": "n_embd",
                "max_position_embeddings": "n_positions",
                "num_attention_heads": "n_head",
                "num_hidden_layers": "n_layer",
            },
        ),
        "llama": Family(
            topology="decoder",
            fields={
                **_DECODER,
                "max_position_embeddings": 2048,
                "attention_bias": False,
                "mlp_bias": False,
            },
            activations=_GATES,
            fixed=_ROTARY_FIXED,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
            rope_kinds=_ROPE_KINDS,
        ),
        "mistral": Family(
            topology="decoder",
            fields={
                **_DECODER,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
            activations=_GATES,
            fixed=_ROTARY_FIXED,
            windows="all",
            rope_kinds=_ROPE_KINDS,
        ),
        "qwen2": Family(
            topology="decoder",
            fields=_QWEN,
            activations=_GATES,
            fixed=_ROTARY_FIXED,
            qkv_bias=True,
            windows="layers",
            rope_kinds=_ROPE_KINDS,
        ),
        "qwen3": Family(
            topology="decoder",
            fields={**_QWEN, "head_dim": 128, "attention_bias": False},
            activations=_GATES,
            fixed=_ROTARY_FIXED,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            qk_norm=True,
            windows="layers",
            rope_kinds=_ROPE_KINDS,
        ),
        "phi3": Family(
            topology="decoder",
            fields={
                **_DECODER,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "sliding_window": None,
            },
            activations=_GATES,
            fixed=_ROTARY_FIXED,
            windows="all",
            rope_kinds=("default",),
        ),
        "gemma2": Family(
            topology="decoder",
            fields={
                **_GEMMA,
                "max_position_embeddings": 8192,
                "final_logit_softcapping": 30.0,
                "attn_logit_softcapping": 50.0,
            },
            activations=_GATES,
            fixed=_GEMMA_FIXED,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            windows="pattern",
            window_pattern=2,
            rope_kinds=_ROPE_KINDS,
            activation="hidden_activation",
            norm_offset=1.0,
            post_norms=True,
            scales_embedding=True,
        ),
        "gemma3_text": Family(
            topology="decoder",
            # its attention reads no soft cap
            fields={
                **_GEMMA,
                "max_position_embeddings": 131072,
                "final_logit_softcapping": None,
                "sliding_window_pattern": 6,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
            },
            activations=_GATES,
            fixed=_GEMMA_FIXED,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            qk_norm=True,
            windows="pattern",
            window_pattern="sliding_window_pattern",
            rope_kinds=("default", "linear"),
            local_rope=True,
            activation="hidden_activation",
            norm_offset=1.0,
            post_norms=True,
            scales_embedding=True,
        ),
    }
)

# what describes no computation of a generating model: names, training, heads of other tasks, and
# what generation_config.json has taken over
_HARMLESS = """
_name_or_path name_or_path architectures model_type transformers_version torch_dtype dtype
auto_map tokenizer_class use_cache use_return_dict return_dict initializer_range
bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
id2label label2id num_labels problem_type task_specific_params finetuning_task prefix
attention_dropout hidden_dropout dropout attn_pdrop embd_pdrop resid_pdrop classifier_dropout
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
output_attentions output_hidden_states chunk_size_feed_forward tie_encoder_decoder
cross_attention_hidden_size is_decoder torchscript use_bfloat16 gradient_checkpointing
attn_implementation _attn_implementation pretraining_tp reorder_and_upcast_attn n_ctx
do_sample temperature top_k top_p typical_p repetition_penalty length_penalty max_length
min_length num_beams num_beam_groups diversity_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens early_stopping
tf_legacy_loss unsloth_version unsloth_fixed
_sliding_window_pattern cache_implementation
"""
HARMLESS: Final = frozenset(_HARMLESS.split())
