"""Tiny random checkpoints of every supported architecture, made by transformers (or, for nanoGPT,
by hand) in a test's own directory. The weights are seeded: the same kind gives the same model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 256
MAX_POSITIONS = 256
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 20,
    "sliding_window": 11,
    "num_hidden_layers": 4,
}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _make(name: str, **overrides: Any) -> Callable[[], PreTrainedModel]:
    """A transformers model class's name and its configuration, built on demand."""

    def build() -> PreTrainedModel:
        config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
        config_class = getattr(transformers, config_name)
        model_class = getattr(
            transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
        )
        common = {} if name == "GPT2" else _COMMON
        return model_class(config_class(**(common | overrides)))

    return build


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama2": _make("Llama", num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama3": _make("Llama", rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True),
    "llama_linear": _make(
        "Llama", rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    ),
    "smollm2": _make(
        "Llama",
        num_attention_heads=3,
        num_key_value_heads=1,
        hidden_size=48,
        tie_word_embeddings=True,
    ),
    "mistral": _make("Mistral", sliding_window=11, head_dim=24),
    "qwen2": _make("Qwen2", tie_word_embeddings=True),
    "qwen2_window": _make("Qwen2", use_sliding_window=True, sliding_window=13, max_window_layers=1),
    "qwen3": _make("Qwen3", head_dim=32, tie_word_embeddings=True),
    "llama_gelu": _make("Llama", hidden_act="gelu", mlp_bias=True),
    "qwen3_gelu_tanh": _make("Qwen3", hidden_act="gelu_pytorch_tanh", head_dim=32),
    "phi3": _make("Phi3", sliding_window=40),
    # caps at which random scores and logits bend
    "gemma2": _make("Gemma2", **_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": _make(
        "Gemma3",
        **_GEMMA,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "gpt2": _make(
        "GPT2",
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_POSITIONS,
        n_embd=64,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def make_model(kind: str) -> PreTrainedModel:
    """The transformers model of `kind` in FP32, with weights large enough to tell tokens apart."""
    torch.manual_seed(sum(kind.encode()))
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.0 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.uniform_(-0.2, 0.2)
                if "gemma" in kind:  # whose norms add the 1 themselves
                    continue
                if "norm.weight" in name or ("ln_" in name and name.endswith("weight")):
                    parameter.add_(1)
    return model


def make_checkpoint(kind: str, directory: Path) -> Path:
    """Write the checkpoint of `kind` (a key of KINDS, or "nanogpt") into `directory`.

    Returns what `EngineConfig.model_path` wants: the directory, or the .pt file within it.
    """
    if kind == "nanogpt":
        return _make_nanogpt(directory / "ckpt.pt")
    make_model(kind).save_pretrained(directory)
    return directory


def nanogpt_checkpoint(compiled: bool = True, bias: bool = False) -> dict[str, Any]:
    """What nanoGPT's train.py saves, less the optimizer; names as torch.compile leaves them."""
    torch.manual_seed(7)
    width, layers = 64, 2
    arguments = {
        "n_layer": layers,
        "n_head": 4,
        "n_embd": width,
        "block_size": MAX_POSITIONS,
        "bias": bias,
        "vocab_size": VOCAB_SIZE,
        "dropout": 0.0,
    }
    shapes = {"transformer.wte": (VOCAB_SIZE, width), "transformer.wpe": (MAX_POSITIONS, width)}
    norms = ["transformer.ln_f"]
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        norms += [prefix + "ln_1", prefix + "ln_2"]
        shapes |= {
            prefix + "attn.c_attn": (3 * width, width),
            prefix + "attn.c_proj": (width, width),
            prefix + "mlp.c_fc": (4 * width, width),
            prefix + "mlp.c_proj": (width, 4 * width),
        }
    state = {
        f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()
    }
    state |= {f"{name}.weight": 1 + 0.1 * torch.randn(width) for name in norms}
    if bias:
        state |= {f"{name}.bias": 0.1 * torch.randn(width) for name in norms}
        state |= {
            f"{name}.bias": 0.1 * torch.randn(shape[0])
            for name, shape in shapes.items()
            if ".h." in name
        }
    state["lm_head.weight"] = state["transformer.wte.weight"]
    if compiled:
        state = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    return {"model": state, "model_args": arguments, "iter_num": 5, "config": {"dataset": "none"}}


def _make_nanogpt(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(nanogpt_checkpoint(), path)
    return path
