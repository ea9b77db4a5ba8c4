"""The made-up vocabulary is one that the tokenizer serves, and texts have the size asked for."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import pytest
from nanoinfer_tokenizer.loading import load_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def random_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import random_text

    return random_text


def test_every_id_has_its_text(random_text: ModuleType, tmp_path: Path) -> None:
    random_text.write_ranks(tmp_path / "random.tiktoken", 20_000)
    encoding = load_tokenizer(tmp_path).encoding
    tokens = encoding.vocabulary.spelling.tokens
    assert len(tokens) == 20_000
    assert len(set(tokens)) == 20_000
    assert all(tokens)


def test_a_text_has_as_many_tokens_as_asked_for(random_text: ModuleType, tmp_path: Path) -> None:
    random_text.write_ranks(tmp_path / "random.tiktoken", 20_000)
    encoding = load_tokenizer(tmp_path).encoding
    write = random_text.random_text
    texts = [write(count, random.Random(count)) for count in (2, 64, 512)]
    assert [len(encoding.encode(text)) for text in texts] == [2, 64, 512]
    assert write(64, random.Random(1)) != write(64, random.Random(2))
