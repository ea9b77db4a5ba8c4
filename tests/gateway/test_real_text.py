"""Streamed deltas over real vocabularies: the library's text, however the ids are cut."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoinfer_common.detokenize import Spelling
from nanoinfer_gateway.core.text import CompletionText
from nanoinfer_tokenizer.encodings import Vocabulary
from nanoinfer_tokenizer.loading import load_tokenizer
from tokenizers import Tokenizer

from tests.real import real_tokenizer

# One that strips a space and spells bytes, one with runs of spaces, one of plain bytes.
NAMES = ("llama2", "gemma3", "qwen3")
TEXT = "  Zwölf Boxkämpfer 🏳️‍🌈 ꙮ\n\n\n    jagen\t\tVitaly ཨ་མ <b> 你好 \u00a0 end"


@cache
def vocabulary(name: str) -> Vocabulary:
    return load_tokenizer(real_tokenizer(name)).encoding.vocabulary


@cache
def library(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(real_tokenizer(name) / "tokenizer.json"))


@st.composite
def some_ids(draw: st.DrawFn, name: str) -> list[int]:
    """Ids of a real text, some of them replaced: by bytes, special tokens or any others."""
    known = vocabulary(name)
    odd = [*sorted(known.spelling.byte_ids), *sorted(known.special)[:20]]
    ids = library(name).encode(TEXT, add_special_tokens=False).ids
    start = draw(st.integers(0, len(ids) - 1))
    ids = ids[start : start + draw(st.integers(1, 25))]
    for place in draw(st.sets(st.integers(0, len(ids) - 1), max_size=4)):
        ids[place] = draw(st.sampled_from(odd) | st.integers(0, len(known.spelling.tokens) - 1))
    return ids


def deltas(completion: CompletionText, ids: list[int], cuts: list[int]) -> str:
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    text = ""
    for start, end in pairwise(edges):
        text += completion.feed(ids[start:end])
        if completion.stop is not None:
            return text
    return text + completion.flush()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_deltas_join_to_the_librarys_text(name: str, data: st.DataObject) -> None:
    ids = data.draw(some_ids(name))
    cuts = data.draw(st.lists(st.integers(0, 25), max_size=6))
    for spelling, skip in ((vocabulary(name).without_special, True), (spelled(name), False)):
        expected = library(name).decode(ids, skip_special_tokens=skip)
        assert deltas(CompletionText(spelling, []), ids, cuts) == expected
        assert deltas(CompletionText(spelling, ["never\0"]), ids, cuts) == expected


def spelled(name: str) -> Spelling:
    return vocabulary(name).spelling


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_stop_string_ends_at_the_token_that_completes_it(name: str, data: st.DataObject) -> None:
    ids = data.draw(some_ids(name))
    cuts = data.draw(st.lists(st.integers(0, 25), max_size=6))
    whole = library(name).decode(ids)
    start = data.draw(st.integers(0, max(len(whole) - 1, 0)))
    stop = whole[start : start + data.draw(st.integers(1, 3))]
    if not stop or "\ufffd" in stop:  # what may still become a character is no text yet
        stop = "\0"
    completion = CompletionText(vocabulary(name).without_special, [stop])
    text = deltas(completion, ids, cuts)
    prefixes = (library(name).decode(ids[:size]) for size in range(1, len(ids) + 1))
    found = next(((n, t) for n, t in enumerate(prefixes, 1) if stop in t), None)
    if found is None:
        assert (text, completion.stop) == (whole, None)
    else:
        assert completion.stop == stop
        assert completion.num_tokens == found[0]
        assert text == found[1][: found[1].index(stop)]


@pytest.mark.parametrize("text", ["日本", "a日本b"])
def test_min_tokens_holds_for_what_byte_tokens_complete(text: str) -> None:
    pieces = ["a", "b", *(f"{byte:02X}" for byte in "日本".encode())]
    tokens = (b"a", b"b", *(bytes.fromhex(piece) for piece in pieces[2:]))
    spelling = Spelling(tokens, byte_ids=frozenset(range(2, 8)))
    ids = [{"a": [0], "b": [1], "日": [2, 3, 4], "本": [5, 6, 7]}[c] for c in text]
    flat = [token_id for some in ids for token_id in some]
    completed = flat.index(4) + 1
    for min_tokens in range(len(flat) + 1):
        completion = CompletionText(spelling, ["日"], min_tokens=min_tokens)
        out = completion.feed(flat)
        if min_tokens <= completed:
            assert (completion.num_tokens, completion.stop) == (completed, "日")
            assert out == text[: text.index("日")]
        else:
            assert completion.stop is None
            assert out + completion.flush() == text


def test_text_that_goes_on_keeps_its_first_space() -> None:
    spelling = Spelling((b" x", b" "), first_tokens={0: b"x"}, strip_leading_spaces=1)
    assert CompletionText(spelling, []).feed([0, 0]) == "x x"
    assert CompletionText(spelling, [], continues=True).feed([0, 0]) == " x x"
