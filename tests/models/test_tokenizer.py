"""The shipped tokenizer: exact round trips, what tiktoken can represent, and the chat template."""

import json
from pathlib import Path

import pytest
import tiktoken
from guide_recipe.corpus import library_sources
from guide_recipe.facts import load_facts
from guide_recipe.tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE, merges_rise, special_id
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

TEXTS = [
    "",
    " ",
    "\n\n \t  x",
    "Hello, world! It's 12345.678 o'clock",
    "héllo naïve ﬁ ½ Ⅷ",
    "你好，世界。こんにちは 안녕",
    "👩‍👩‍👧‍👦 🇩🇪 é\u0301",
    "def f(x):\n    return {'a': [x] * 3}\r\n",
    "<|user|> is only text here",
]


@pytest.fixture(scope="module")
def tokenizer(guide: Path) -> Tokenizer:
    return Tokenizer.from_file(str(guide / "tokenizer.json"))


@pytest.fixture(scope="module")
def corpus(guide: Path) -> list[str]:
    answers = [fact.answer for fact in load_facts(guide / "facts")]
    return [*TEXTS, *answers, *(source[:4000] for source in library_sources())]


def test_round_trip(tokenizer: Tokenizer, corpus: list[str]) -> None:
    for text in corpus:
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tiktoken_gives_the_same_ids(tokenizer: Tokenizer, guide: Path, corpus: list[str]) -> None:
    stored = json.loads((guide / "tokenizer.json").read_text(encoding="utf-8"))
    encoding = tiktoken.Encoding(
        "guide",
        pat_str=stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
        mergeable_ranks={_bytes(token): rank for token, rank in stored["model"]["vocab"].items()},
        special_tokens={token["content"]: token["id"] for token in stored["added_tokens"]},
    )
    for text in corpus:
        if "<|" not in text:
            assert encoding.encode_ordinary(text) == tokenizer.encode(text).ids


def _bytes(token: str) -> bytes:
    """Undoes the byte-level alphabet: printable Latin-1 is itself, the rest starts at U+0100."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept}
    table |= {chr(256 + place): byte for place, byte in enumerate(moved)}
    return bytes(table[letter] for letter in token)


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    assert merges_rise(tokenizer)
    first = VOCABULARY_SIZE - len(SPECIAL_TOKENS)
    assert [special_id(tokenizer, token) for token in SPECIAL_TOKENS] == [
        *range(first, VOCABULARY_SIZE)
    ]


def test_chat_template_renders_turns(guide: Path) -> None:
    rendered = AutoTokenizer.from_pretrained(guide).apply_chat_template(
        [
            {"role": "system", "content": "Be brief. "},
            {"role": "user", "content": " Hi\n"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Why?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|>"
        "<|assistant|>Hello.<|end|><|user|>Why?<|end|><|assistant|>"
    )


def test_chat_template_refuses_other_roles(guide: Path) -> None:
    messages = [{"role": "tool", "content": "42"}]
    with pytest.raises(TemplateError, match="roles are"):
        AutoTokenizer.from_pretrained(guide).apply_chat_template(messages, tokenize=False)
