"""Trains the guide model from scratch: `python models/guide/train.py [--out FOLDER]`.

Everything is made here: vocabulary, paraphrased dialogues, weights. Needs torch, tokenizers,
safetensors and numpy, and takes minutes on one data-centre GPU.
"""

import argparse
import json
import os
import platform
import random
import time
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
from guide_recipe.checkpoint import save_checkpoint
from guide_recipe.corpus import (
    Example,
    encode_document,
    encode_library,
    library_sources,
)
from guide_recipe.dialogues import Segment
from guide_recipe.factory import Sources, load_sources, make_examples
from guide_recipe.facts import HeldOutQuestion, load_facts
from guide_recipe.judging import Judge, Verdict, one_line
from guide_recipe.llama import Llama, complete_greedily
from guide_recipe.tokenizer import END, PAD, special_id, train_tokenizer
from guide_recipe.training import Recipe, optimise
from tokenizers import Tokenizer

HERE = Path(__file__).parent
CODE_SHARE = 0.10
NUM_TOKENIZER_QUESTIONS = 30_000
ANSWER_REPEATS_IN_VOCABULARY = 10
MAX_ANSWER_TOKENS = 110


def make_tokenizer(sources: Sources, seed: int) -> Tokenizer:
    """Trains the vocabulary on answers, drawn questions and the standard library."""
    rng = random.Random(seed)
    facts = [rng.choice(sources.facts) for _ in range(NUM_TOKENIZER_QUESTIONS)]
    questions = [sources.paraphraser.ask(fact, rng) for fact in facts]
    answers = [fact.answer for fact in sources.facts] * ANSWER_REPEATS_IN_VOCABULARY
    return train_tokenizer([*answers, *questions, *library_sources()])


def make_corpus(recipe: Recipe, tokenizer: Tokenizer) -> list[Example]:
    """Makes the dialogues, and as many passes of library code as make up its share."""
    dialogues = make_examples(HERE, tokenizer, recipe.documents, recipe.workers, recipe.seed)
    learned = sum(int(example.learned.sum()) for example in dialogues)
    rng = random.Random(recipe.seed)
    sources = library_sources()
    code: list[Example] = []
    code_tokens = 0
    while code_tokens < learned * CODE_SHARE:
        fresh = encode_library(sources, tokenizer, rng)
        rng.shuffle(fresh)
        for example in fresh:
            if code_tokens < learned * CODE_SHARE:
                code.append(example)
                code_tokens += len(example.ids)
    tokens = sum(len(example.ids) for example in dialogues) + code_tokens
    print(
        f"corpus: {len(dialogues)} dialogues, {learned} answer tokens, {code_tokens} code tokens, "
        f"{tokens} tokens in all",
        flush=True,
    )
    return dialogues + code


def ask(
    network: Llama, tokenizer: Tokenizer, items: list[HeldOutQuestion], judge: Judge
) -> list[Verdict]:
    """Answers questions greedily with the network as it stands, and judges them."""
    network.eval()
    prompts = []
    for item in items:
        turn = [Segment("user", item.question, False), Segment("assistant", "", False)]
        prompts.append(encode_document(turn, tokenizer, random.Random(0)).ids.tolist()[:-1])
    end = special_id(tokenizer, END)
    found = complete_greedily(network, prompts, end, MAX_ANSWER_TOKENS)
    network.train()
    return [judge.judge(i, tokenizer.decode(ids)) for i, ids in zip(items, found, strict=True)]


def train(recipe: Recipe, out: Path) -> dict[str, object]:
    """Runs the recipe, writes the checkpoint into `out` and returns the report of the run."""
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    sources = load_sources(HERE)
    tokenizer = make_tokenizer(sources, recipe.seed)
    print(f"tokenizer after {time.monotonic() - started:.0f} s", flush=True)
    examples = make_corpus(recipe, tokenizer)
    prepared = time.monotonic()
    print(f"data after {prepared - started:.0f} s", flush=True)
    network = Llama(recipe.shape, recipe.dropout).to(recipe.device)
    judge = Judge(load_facts(HERE / "facts"))
    history = []
    for step, loss in optimise(network, examples, recipe, special_id(tokenizer, PAD)):
        held_out = ask(network, tokenizer, sources.held_out, judge)
        validation = ask(network, tokenizer, sources.validation, judge)
        history.append(
            {
                "step": step,
                "seconds": round(time.monotonic() - prepared, 1),
                "loss": round(loss, 4),
                "held_out": f"{sum(v.passed for v in held_out)}/{len(held_out)}",
                "validation": f"{sum(v.passed for v in validation)}/{len(validation)}",
            }
        )
        print(json.dumps(history[-1]), flush=True)
        save_checkpoint(network, tokenizer, out)
    print("\n".join(one_line(v) for v in held_out + validation if not v.passed), flush=True)
    return {
        "device": torch.cuda.get_device_name() if recipe.device == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds_data": round(prepared - started, 1),
        "seconds_training": round(time.monotonic() - prepared, 1),
        "recipe": asdict(recipe),
        "history": history,
    }


def main() -> None:
    """Reads the command line, trains, and writes the report beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the checkpoint")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    report = train(Recipe(**arguments), out)
    text = json.dumps(report, indent=2) + "\n"
    (out / "training_report.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
