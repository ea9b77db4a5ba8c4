"""Fixtures: one directory, loaded tokenizer and reference per family, made once."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from nanoinfer_tokenizer.encodings import Vocabulary
from nanoinfer_tokenizer.loading import LoadedTokenizer, load_tokenizer
from nanoinfer_tokenizer.streaming import StreamDecoder
from tokenizers import Tokenizer

from tests.tokenizer.tiny_tokenizers import make_tokenizer


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a family's model directory."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda family: make_tokenizer(root / family, family))


@pytest.fixture(scope="session")
def loaded(directory_of: Callable[[str], Path]) -> Callable[[str], LoadedTokenizer]:
    """Gives a family's tokenizer as the service loads it."""
    return cache(lambda family: load_tokenizer(directory_of(family)))


@pytest.fixture(scope="session")
def reference(directory_of: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """Gives the `tokenizers` library's own tokenizer, added tokens in text left plain."""

    def load(family: str) -> Tokenizer:
        document = json.loads((directory_of(family) / "tokenizer.json").read_text())
        for entry in document["added_tokens"]:  # all of these families' are markup
            entry["special"] = True
        tokenizer = Tokenizer.from_str(json.dumps(document))
        tokenizer.encode_special_tokens = True
        return tokenizer

    return cache(load)


def decode(vocabulary: Vocabulary, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Decodes a whole text at once."""
    decoder = StreamDecoder(vocabulary, skip_special=skip_special)
    return decoder.push(token_ids) + decoder.finish()
