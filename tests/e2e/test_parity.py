"""Greedy tokens through a real engine process equal `transformers`, alone and in a mixed batch.

The engine runs with steps of 24 tokens, so the prompts prefill in chunks while others decode.
Random weights make near-ties likely, so where the tokens part, the two best logits at that step
must be closer than 1e-4; anything else is a failure.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import grpc
import pytest
import torch
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc, generation_pb2
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import GUIDE
from tests.e2e.stack import start_service
from tests.engine.tiny_checkpoints import make_checkpoint

NUM_TOKENS = 64
TIE = 1e-4


def generate(stub: engine_pb2_grpc.EngineServiceStub, prompt: list[int]) -> list[int]:
    request = engine_pb2.EngineServiceGenerateRequest(
        prompt=generation_pb2.TokenIds(ids=prompt),
        sampling=generation_pb2.SamplingParams(temperature=0),
        stopping=generation_pb2.StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
    )
    stream = stub.Generate(request, timeout=120)
    return [token for message in stream for delta in message.deltas for token in delta.token_ids]


def check_against(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> int:
    """Compares teacher-forced; returns how many near-ties were excused."""
    assert len(tokens) == NUM_TOKENS
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    best = logits.argmax(-1).tolist()
    ties = 0
    for step, (ours, theirs) in enumerate(zip(tokens, best, strict=True)):
        if ours != theirs:
            gap = float(logits[step, theirs] - logits[step, ours])
            assert gap < TIE, f"step {step}: {ours} instead of {theirs}, {gap} below it"
            ties += 1
    return ties


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "qwen3", "mistral", "gpt2", "guide"])
def test_greedy_tokens_equal_transformers(kind: str, tmp_path: Path) -> None:
    path = GUIDE if kind == "guide" else make_checkpoint(kind, tmp_path / kind)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    source = random.Random(7)
    prompts = [[source.randrange(vocabulary) for _ in range(n)] for n in (3, 17, 61, 40, 1)]
    flags = ["--model", str(path), "--threads", "1"]
    flags += ["--max-batch-tokens", "24", "--max-batch-requests", "8"]
    with (
        start_service("nanoinfer_engine", flags, tmp_path / "log") as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        alone = [generate(stub, prompt) for prompt in prompts[:2]]
        mixed: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda i=i: mixed.update({i: generate(stub, prompts[i])}))
            for i in range(len(prompts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    ties = sum(check_against(model, p, t) for p, t in zip(prompts, alone, strict=False))
    ties += sum(check_against(model, prompts[i], mixed[i]) for i in range(len(prompts)))
    assert ties <= 2, "more near-ties than chance gives"
