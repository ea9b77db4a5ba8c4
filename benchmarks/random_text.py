"""A vocabulary of made-up words, and texts of them: every id of a random model has its text."""

from __future__ import annotations

import base64
import itertools
import random
import string
from collections.abc import Iterator
from pathlib import Path

_LETTERS = string.ascii_lowercase


def write_ranks(file: Path, vocab_size: int) -> None:
    """A tiktoken rank file: bytes, then words of 2, 3 and 4 letters. The last id is left free.

    It is the end-of-text token of the pattern (`gpt2`) that a rank file has by default.
    """
    tokens = itertools.chain((bytes([value]) for value in range(256)), _words())
    lines = [
        b"%s %d\n" % (base64.b64encode(token), rank)
        for rank, token in enumerate(itertools.islice(tokens, vocab_size - 1))
    ]
    file.write_bytes(b"".join(lines))


def random_text(num_tokens: int, source: random.Random) -> str:
    """Words of three letters, each a token, and the spaces before them, tokens too."""
    return "".join(f" {''.join(source.choices(_LETTERS, k=3))}" for _ in range(num_tokens // 2))


def _words() -> Iterator[bytes]:
    for length in (2, 3, 4):
        for letters in itertools.product(_LETTERS, repeat=length):
            yield "".join(letters).encode()
