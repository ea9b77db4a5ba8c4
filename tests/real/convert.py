"""Turns the fetched GGUF of SmolLM2-135M-Instruct into a model directory, once.

`python -m tests.real.convert FOLDER` reads the folder's GGUF with `transformers` and `gguf`, so
that nothing of ours takes part, and writes config, tokenizer and weights beside it.
"""

import os
import sys
from pathlib import Path


def convert(folder: Path) -> None:
    """Writes the model directory `FOLDER/model`, whole or not at all."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    (gguf,) = folder.glob("*.gguf")
    scratch = folder / f"model.{os.getpid()}"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    config = AutoConfig.from_pretrained(folder, gguf_file=gguf.name)
    model = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{gguf.name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.to(torch.float32).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(folder / "model")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    target = Path(sys.argv[1])
    if not (target / "model").is_dir():
        convert(target)
