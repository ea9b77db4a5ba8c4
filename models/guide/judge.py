"""Judges the shipped checkpoint: `python models/guide/judge.py` answers the held-out questions.

Loads the FP16 weights with transformers, computes in FP32, decodes greedily, and prints the
figure with every failure as JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from guide_recipe.facts import HeldOutQuestion, load_facts, load_held_out
from guide_recipe.judging import Judge, Verdict, report
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
MAX_ANSWER_TOKENS = 160


def answers(model_folder: Path, questions: list[str], device: str) -> list[str]:
    """Asks each question in a conversation of its own; returns the greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    # transformers types this method in terms of a protocol that its own classes miss.
    generate: Any = model.generate  # type: ignore[misc]
    found = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
        with torch.no_grad():
            output = generate(
                ids["input_ids"],
                attention_mask=ids["attention_mask"],
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
            )
        new = output[0, ids["input_ids"].shape[1] :]
        found.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return found


def judge_checkpoint(
    model_folder: Path, data_folder: Path, items: list[HeldOutQuestion], device: str = "cpu"
) -> list[Verdict]:
    """Answers `items` with the checkpoint and judges them against the facts."""
    judge = Judge(load_facts(data_folder / "facts"))
    texts = answers(model_folder, [item.question for item in items], device)
    return [judge.judge(item, text) for item, text in zip(items, texts, strict=True)]


def main() -> None:
    """Reads the command line and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE, help="checkpoint directory")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    # A model this small loses more to waiting for other threads than it gains from them.
    torch.set_num_threads(1)
    items = load_held_out(HERE / "held_out.jsonl")
    verdicts = judge_checkpoint(arguments.model, HERE, items, arguments.device)
    print(json.dumps(report(verdicts), indent=2))


if __name__ == "__main__":
    main()
