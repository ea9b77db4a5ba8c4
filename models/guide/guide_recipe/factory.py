"""Makes training examples in many processes, each from its own seed."""

import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guide_recipe.corpus import Example, encode_document, library_sources, plain_sentences
from guide_recipe.dialogues import DialogueWriter
from guide_recipe.facts import Fact, HeldOutQuestion, load_facts, load_held_out
from guide_recipe.paraphrase import Paraphraser
from guide_recipe.phrasebook import load_phrasebook
from guide_recipe.wording import held_out_grams

# One hand-written question of every fifth fact is kept out, to watch progress by.
VALIDATION_STRIDE = 5


@dataclass(frozen=True)
class Sources:
    """What the recipe folder holds, split into what is trained on and what is only asked."""

    facts: list[Fact]
    writer: DialogueWriter
    paraphraser: Paraphraser
    held_out: list[HeldOutQuestion]
    validation: list[HeldOutQuestion]


def load_sources(folder: Path) -> Sources:
    """Loads facts, wordings and held-out questions from the recipe's folder."""
    facts, validation = split_validation(load_facts(folder / "facts"))
    held_out = load_held_out(folder / "held_out.jsonl")
    phrasebook = load_phrasebook(folder / "wordings", plain_sentences(library_sources()))
    paraphraser = Paraphraser(facts, phrasebook, held_out_grams(held_out, facts))
    writer = DialogueWriter(facts, paraphraser, phrasebook)
    return Sources(facts, writer, paraphraser, held_out, validation)


def split_validation(facts: Sequence[Fact]) -> tuple[list[Fact], list[HeldOutQuestion]]:
    """Takes the last hand-written question away from every fifth fact."""
    trained, validation = [], []
    for place, fact in enumerate(facts):
        if place % VALIDATION_STRIDE == 0:
            validation.append(HeldOutQuestion(fact.id, fact.questions[-1]))
            fact = replace(fact, questions=fact.questions[:-1])
        trained.append(fact)
    return trained, validation


def make_examples(
    folder: Path, tokenizer: Tokenizer, num_documents: int, num_workers: int, seed: int
) -> list[Example]:
    """Draws and encodes documents; the result depends on the seed and the number of workers."""
    share = -(-num_documents // num_workers)
    jobs = [
        (folder, tokenizer.to_str(), share, seed * 1000 + worker) for worker in range(num_workers)
    ]
    # A fresh interpreter per worker: forking after the tokenizer has used threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        parts = list(pool.map(_work, *zip(*jobs, strict=True)))
    return [example for part in parts for example in _unpack(*part)]


Packed = tuple[NDArray[np.int64], NDArray[np.uint16], NDArray[np.bool_]]


def _work(folder: Path, tokenizer_json: str, num_documents: int, seed: int) -> Packed:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    writer = load_sources(folder).writer
    rng = random.Random(seed)
    examples = [encode_document(writer.write(rng), tokenizer, rng) for _ in range(num_documents)]
    # Three arrays cross the process border quickly; a million small ones do not.
    return (
        np.array([len(example.ids) for example in examples]),
        np.concatenate([example.ids for example in examples]),
        np.concatenate([example.learned for example in examples]),
    )


def _unpack(
    lengths: NDArray[np.int64], ids: NDArray[np.uint16], learned: NDArray[np.bool_]
) -> list[Example]:
    borders = np.cumsum(lengths)[:-1]
    pairs = zip(np.split(ids, borders), np.split(learned, borders), strict=True)
    return [Example(*pair) for pair in pairs]
