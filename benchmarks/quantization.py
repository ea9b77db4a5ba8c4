"""Measures what FP8 costs in logits: weights, KV cache and both against full precision.

    python benchmarks/quantization.py [--model models/guide] [--device cuda] [--questions 40]

The model reads questions and answers of the guide's facts, one conversation a prompt, through the
plain path: FP16 on CUDA, FP32 on the CPU. Prints one JSON line a setting, over all positions:
relative error of the logits, KL divergence in nats (mean, and the 99th percentile), and how often
the best id is the same. `answers` says the last for the answers alone, which the model knows by
heart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from nanoinfer_engine.core.batch import Batch, BatchRow
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.ops.attention import ReferenceAttention
from nanoinfer_engine.ops.reference import ReferenceOps, ReferenceStep
from nanoinfer_engine.step.inputs import build_inputs
from nanoinfer_engine.step.runner import ModelRunner
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from tokenizers import Tokenizer
from torch import Tensor

SETTINGS = {
    "weights": {"quantization": "fp8"},
    "kv_cache": {"kv_cache_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
GREEDY = SamplingOptions(0.0, 0, 1.0, 0.0, 0)


def conversations(model: Path, count: int) -> Iterator[tuple[list[int], int]]:
    """Ids of a question with its answer, and where the answer begins."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = (model / "facts" / "nanoinfer.jsonl").read_text().splitlines()
    for line in lines[:count]:
        fact = json.loads(line)
        question = tokenizer.encode(f"<|begin|><|user|>{fact['questions'][0]}<|end|><|assistant|>")
        answer = tokenizer.encode(fact["answer"] + "<|end|>")
        yield question.ids + answer.ids, len(question.ids)


@torch.inference_mode()
def logits(config: EngineConfig, texts: Sequence[tuple[list[int], int]]) -> Tensor:
    """[tokens, vocabulary] in float64 on the CPU; the model loaded as the service does."""
    runner = ModelRunner(config)
    model, cache = runner._model, runner._cache
    attention = ReferenceAttention(cache, runner.model_config.sliding_windows)
    ops = ReferenceOps(attention)
    parts = []
    for ids, _ in texts:
        blocks = tuple(range(-(-len(ids) // config.block_size)))
        batch = Batch((BatchRow(tuple(ids), 0, blocks, True, GREEDY),))
        inputs = build_inputs(batch, config.block_size, cache.device)
        plan = attention.plan(inputs.attention)
        hidden = model(ops, ReferenceStep(inputs.token_ids, inputs.positions, plan))
        parts.append(model.logits(ops, hidden).double().cpu())
    return torch.cat(parts)


def compare(actual: Tensor, expected: Tensor, answers: Tensor) -> dict[str, float]:
    """Errors of `actual` logits against `expected`; `answers` marks the answers' positions."""
    same = (actual.argmax(-1) == expected.argmax(-1)).double()
    ours, theirs = actual.log_softmax(-1), expected.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return {
        "relative_error": float((actual - expected).norm() / expected.norm()),
        "kl": float(divergence.mean()),
        "kl_p99": float(divergence.quantile(0.99)),
        "top1_agreement": float(same.mean()),
        "answers": float(same[answers].mean()),
    }


def main(argv: Sequence[str]) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/guide"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=40)
    arguments = parser.parse_args(argv)
    texts = list(conversations(arguments.model, arguments.questions))
    dtype = "float16" if arguments.device.startswith("cuda") else "float32"
    plain = {"model_path": arguments.model, "device": arguments.device, "dtype": dtype}
    expected = logits(EngineConfig(**plain), texts)
    answers = torch.cat([torch.arange(1, len(ids) + 1) >= start for ids, start in texts])
    context = {"model": open_checkpoint(arguments.model).config.model_type}
    context |= {"device": arguments.device, "against": dtype, "torch": torch.__version__}
    for name, setting in SETTINGS.items():
        actual = logits(EngineConfig(**plain, **setting), texts)  # type: ignore[arg-type]
        figures = {
            key: float(f"{value:.4g}") for key, value in compare(actual, expected, answers).items()
        }
        print(json.dumps({"fp8": name, **figures, "tokens": len(expected), **context}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
