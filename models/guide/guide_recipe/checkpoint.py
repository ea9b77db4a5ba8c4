"""Writes the trained network as a Hugging Face model directory, FP16 on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from guide_recipe.llama import Llama, LlamaShape
from guide_recipe.tokenizer import BEGIN, END, PAD, save_tokenizer


def save_checkpoint(network: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights, configurations and tokenizer into `folder`, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    begin, end, pad = (tokenizer.token_to_id(token) for token in (BEGIN, END, PAD))
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    _write(folder / "config.json", {**_architecture(network.shape), **ids})
    _write(folder / "generation_config.json", {**ids, "do_sample": False})
    save_tokenizer(tokenizer, folder)


def _architecture(shape: LlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
