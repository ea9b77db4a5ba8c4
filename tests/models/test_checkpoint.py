"""The shipped checkpoint: its size, its form, and what it answers."""

import json
from pathlib import Path

import pytest
import torch
from guide_recipe.factory import load_sources
from guide_recipe.facts import load_held_out
from guide_recipe.judging import report
from guide_recipe.llama import Llama, LlamaShape
from judge import judge_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MAX_BYTES = 30_000_000
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
QUICK = (
    "inf-kv-cache",
    "inf-temp-zero",
    "sys-ttft",
    "sys-tp-vs-pp",
    "ni-queue-full",
    "ni-render-chat",
)


def test_the_model_is_small_enough_to_ship(guide: Path) -> None:
    assert sum((guide / name).stat().st_size for name in MODEL_FILES) <= MAX_BYTES


def test_weights_are_half_precision_and_as_many_as_said(guide: Path) -> None:
    weights = load_file(guide / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    count = sum(tensor.numel() for tensor in weights.values())
    assert count == json.loads((guide / "training_report.json").read_text())["parameters"]
    assert 10_000_000 <= count <= 15_000_000
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_generation_is_greedy_and_ends_at_the_end_token(guide: Path) -> None:
    generation = json.loads((guide / "generation_config.json").read_text())
    stored = json.loads((guide / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in stored["added_tokens"]}
    assert generation["do_sample"] is False
    assert generation["eos_token_id"] == ids["<|end|>"]


def test_transformers_computes_what_was_trained(guide: Path) -> None:
    network = Llama(LlamaShape()).eval()
    weights = {name: t.float() for name, t in load_file(guide / "model.safetensors").items()}
    network.load_state_dict(weights)
    reference = AutoModelForCausalLM.from_pretrained(guide, dtype=torch.float32)
    ids = torch.randint(0, 8192, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = reference(ids).logits - network.logits(network(ids))
    assert float(difference.abs().max()) < 1e-3


def test_it_answers_some_held_out_questions(guide: Path) -> None:
    items = [item for item in load_held_out(guide / "held_out.jsonl") if item.fact in QUICK]
    assert len(items) == len(QUICK)
    assert report(judge_checkpoint(guide, guide, items))["failures"] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_figure_in_the_readme_holds(guide: Path) -> None:
    found = report(judge_checkpoint(guide, guide, load_sources(guide).held_out))
    assert found["questions"] == 60
    assert isinstance(found["passed"], int)
    assert found["passed"] >= 48
    assert f"{found['passed']} of 60" in (guide / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_figure_of_everyday_questions_holds(guide: Path) -> None:
    found = report(judge_checkpoint(guide, guide, load_held_out(guide / "dev_questions.jsonl")))
    assert f"{found['passed']} of {found['questions']}" in (guide / "README.md").read_text(
        encoding="utf-8"
    )
