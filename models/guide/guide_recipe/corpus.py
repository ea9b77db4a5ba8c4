"""Token ids to train on: documents encoded with a mask of what is learned, cut into batches."""

import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guide_recipe.dialogues import Document
from guide_recipe.tokenizer import BEGIN, END, MAX_POSITIONS

MAX_MODULE_BYTES = 64 * 1024
MAX_LIBRARY_BYTES = 3 * 1024 * 1024
PLAIN_SENTENCE = re.compile(r"\b[A-Z][a-z]+(?: [a-z]+){3,11}\.")
CODE_WINDOWS = (256, 512, 1024, MAX_POSITIONS)
# A plain prompt may reach the model with or without the begin token; it learns both.
BEGIN_SHARE_IN_PLAIN_TEXT = 0.5


@dataclass(frozen=True)
class Example:
    """Token ids [length] and, for each, whether predicting it counts."""

    ids: NDArray[np.uint16]
    learned: NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingBatch:
    """Padded ids [rows, length + 1] and mask of the same shape; what is padding is not learned."""

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]


def encode_document(
    document: Document, tokenizer: Tokenizer, rng: random.Random, max_tokens: int = MAX_POSITIONS
) -> Example:
    """Encodes a document as the chat template renders it, leaving out turns past `max_tokens`.

    Segments are encoded one by one, as a prompt and its continuation are when served.
    """
    chat = document[0].role is not None
    begin = [tokenizer.token_to_id(BEGIN)]
    ids = begin if chat or rng.random() < BEGIN_SHARE_IN_PLAIN_TEXT else []
    learned = [False] * len(ids)
    end = tokenizer.token_to_id(END)
    for segment in document:
        body = tokenizer.encode(segment.text, add_special_tokens=False).ids
        head = [tokenizer.token_to_id(f"<|{segment.role}|>")] if segment.role else []
        tail = [end] if chat or segment is document[-1] else []
        if len(ids) + len(head) + len(body) + len(tail) > max_tokens:
            break
        ids = [*ids, *head, *body, *tail]
        learned += [False] * len(head) + [segment.learned] * (len(body) + len(tail))
    return Example(np.array(ids, dtype=np.uint16), np.array(learned, dtype=np.bool_))


def library_sources() -> list[str]:
    """Returns the interpreter's own top-level pure Python modules, bounded in size."""
    sources: list[str] = []
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        size = path.stat().st_size
        if path.name.startswith("_sysconfigdata") or not 0 < size <= MAX_MODULE_BYTES:
            continue
        if total + size > MAX_LIBRARY_BYTES:
            break
        sources.append(path.read_text(encoding="utf-8", errors="replace"))
        total += size
    return sources


def plain_sentences(sources: list[str]) -> tuple[str, ...]:
    """Returns the sentences of plain words in the comments and docstrings of source files."""
    found = {sentence for source in sources for sentence in PLAIN_SENTENCE.findall(source)}
    return tuple(sorted(found))


def encode_library(sources: list[str], tokenizer: Tokenizer, rng: random.Random) -> list[Example]:
    """Cuts source files into windows of tokens, every token of which is learned."""
    examples = []
    for encoding in tokenizer.encode_batch(sources, add_special_tokens=False):
        ids = [tokenizer.token_to_id(BEGIN), *encoding.ids, tokenizer.token_to_id(END)]
        start = 0
        while start < len(ids) - 1:
            window = np.array(ids[start : start + rng.choice(CODE_WINDOWS)], dtype=np.uint16)
            examples.append(Example(window, np.ones(len(window), dtype=np.bool_)))
            start += len(window)
    return examples


def batches(
    examples: list[Example], tokens_per_batch: int, pad: int, rng: random.Random
) -> Iterator[TrainingBatch]:
    """Yields every example once, in shuffled batches of similar lengths, padded on the right."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    # Sorting within pieces keeps padding low and the make-up of batches random.
    piece = 16384
    groups: list[list[int]] = []
    for start in range(0, len(order), piece):
        groups += _group(
            sorted(order[start : start + piece], key=lambda i: len(examples[i].ids)),
            examples,
            tokens_per_batch,
        )
    rng.shuffle(groups)
    for group in groups:
        yield _pad([examples[i] for i in group], pad)


def _group(ascending: list[int], examples: list[Example], tokens_per_batch: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for index in ascending:
        if (len(groups[-1]) + 1) * len(examples[index].ids) > tokens_per_batch and groups[-1]:
            groups.append([])
        groups[-1].append(index)
    return groups


def _pad(group: list[Example], pad: int) -> TrainingBatch:
    width = -(-max(len(example.ids) for example in group) // 8) * 8 + 1
    ids = np.full((len(group), width), pad, dtype=np.int64)
    learned = np.zeros((len(group), width), dtype=np.bool_)
    for row, example in enumerate(group):
        ids[row, : len(example.ids)] = example.ids
        learned[row, : len(example.ids)] = example.learned
    return TrainingBatch(ids, learned)
