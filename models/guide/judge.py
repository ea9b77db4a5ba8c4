"""Judges the shipped checkpoint: `python models/guide/judge.py` answers the held-out questions.

`--questions` names another file of questions, such as dev_questions.jsonl. Loads the FP16 weights
with transformers, computes in FP32, decodes greedily, and prints the figure with every failure as
JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from guide_recipe.dialogues import asked
from guide_recipe.facts import HeldOutQuestion, load_facts, load_held_out
from guide_recipe.judging import Judge, Verdict, report
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
MAX_ANSWER_TOKENS = 160

Message = dict[str, str]


def answers(model_folder: Path, conversations: list[list[Message]], device: str) -> list[str]:
    """Lets the model go on with each conversation; returns the greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    # transformers types this method in terms of a protocol that its own classes miss.
    generate: Any = model.generate  # type: ignore[misc]
    found = []
    for messages in conversations:
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
    facts = load_facts(data_folder / "facts")
    judge = Judge(facts)
    by_id = {fact.id: fact for fact in facts}
    conversations = [
        [{"role": str(turn.role), "content": turn.text} for turn in asked(item, by_id)]
        for item in items
    ]
    texts = answers(model_folder, conversations, device)
    return [judge.judge(item, text) for item, text in zip(items, texts, strict=True)]


def main() -> None:
    """Reads the command line and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE, help="checkpoint directory")
    parser.add_argument("--questions", type=Path, default=HERE / "held_out.jsonl")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    # A model this small loses more to waiting for other threads than it gains from them.
    torch.set_num_threads(1)
    items = load_held_out(arguments.questions)
    verdicts = judge_checkpoint(arguments.model, HERE, items, arguments.device)
    print(json.dumps(report(verdicts), indent=2))


if __name__ == "__main__":
    main()
