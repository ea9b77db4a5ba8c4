"""Decoder and stop matcher against plain references, over random pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoinfer_common.detokenize import Spelling, TextDecoder
from nanoinfer_gateway.core.text import CompletionText, StopMatcher

BYTE_TABLE = Spelling(tuple(bytes([value]) for value in range(256)))
# few characters, so that stop strings overlap, repeat and nearly match
letters = st.text(alphabet="abé日", max_size=30)
stops = st.lists(st.text(alphabet="abé日", min_size=1, max_size=4), min_size=1, max_size=4)


def cut(draw: st.DrawFn, length: int) -> list[slice]:
    """Draws a way of cutting `length` items into pieces, empty ones included."""
    points = draw(st.lists(st.integers(0, length), max_size=8))
    return [slice(a, b) for a, b in pairwise([0, *sorted(points), length])]


@st.composite
def cut_text(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(letters)
    return text, [text[piece] for piece in cut(draw, len(text))]


@st.composite
def cut_bytes(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    raw = draw(st.binary(max_size=40) | st.text(max_size=15).map(str.encode))
    return raw, [raw[piece] for piece in cut(draw, len(raw))]


def first_match(text: str, stop_strings: list[str]) -> tuple[int, str] | None:
    """The reference: smallest end wins, then the longest string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def may_become_stop(text: str, stop_strings: list[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    prefixes = {stop[:size] for stop in stop_strings for size in range(1, len(stop))}
    sizes = [size for size in range(1, len(text) + 1) if text[-size:] in prefixes]
    return max(sizes, default=0)


@given(cut_bytes())
def test_decoding_pieces_is_decoding_the_whole(case: tuple[bytes, list[bytes]]) -> None:
    raw, pieces = case
    decoder = TextDecoder(BYTE_TABLE)
    text = "".join(decoder.feed(piece) for piece in pieces) + decoder.flush()
    assert text == raw.decode("utf-8", "replace")


@given(st.text(max_size=20))
def test_every_piece_ends_on_a_character_and_none_waits_needlessly(text: str) -> None:
    decoder = TextDecoder(BYTE_TABLE)
    for character in text:
        *begin, last = character.encode()
        assert decoder.feed(begin) == ""
        assert decoder.feed([last]) == character
    assert decoder.flush() == ""


def test_an_id_beyond_the_table_has_no_text() -> None:
    decoder = TextDecoder(Spelling((b"a", b"")))
    assert decoder.feed([0, 1, 2, 2**31, 0]) == "aa"


@pytest.mark.matrix("R22")
@settings(max_examples=400)
@given(cut_text(), stops)
def test_matcher_finds_what_the_reference_finds(
    case: tuple[str, list[str]], stop_strings: list[str]
) -> None:
    text, pieces = case
    matcher = StopMatcher(stop_strings)
    out, seen, match = "", "", None
    for piece in pieces:
        free, match = matcher.feed(piece)
        out += free
        seen += piece
        if match is not None:
            break
        # nothing that may become a stop string is out, and nothing else is held back
        assert out == seen[: len(seen) - may_become_stop(seen, stop_strings)]
    expected = first_match(text, stop_strings)
    if expected is None:
        assert match is None
        assert out + matcher.flush() == text
    else:
        start, stop = expected
        assert (out, match) == (text[:start], stop)


@given(letters, stops, st.integers(0, 12), st.data())
def test_a_completions_text_does_not_depend_on_the_cut(
    text: str, stop_strings: list[str], min_tokens: int, data: st.DataObject
) -> None:
    raw = text.encode()
    pieces = [raw[piece] for piece in data.draw(st.composite(cut)(len(raw)))]

    def run(chunks: list[bytes]) -> tuple[str, str | None, int]:
        completion = CompletionText(BYTE_TABLE, stop_strings, min_tokens=min_tokens)
        out = ""
        for chunk in chunks:
            out += completion.feed(chunk)
            if completion.stop is not None:
                return out, completion.stop, completion.num_tokens
        return out + completion.flush(), None, completion.num_tokens

    assert run(pieces) == run([raw])


def test_the_longest_wins_among_matches_that_end_together() -> None:
    assert StopMatcher(["b", "ab", "aab"]).feed("xaab") == ("x", "aab")
    assert StopMatcher(["abcd", "bc"]).feed("abcd") == ("a", "bc")


def test_a_match_before_min_tokens_is_text_and_one_that_reaches_it_counts() -> None:
    early = CompletionText(BYTE_TABLE, ["ab"], min_tokens=3)
    assert early.feed(b"abc") + early.feed(b"ab") == "abc"
    assert (early.stop, early.num_tokens) == ("ab", 5)
    exact = CompletionText(BYTE_TABLE, ["ab"], min_tokens=2)
    assert exact.feed(b"abc") == ""
    assert (exact.stop, exact.num_tokens) == ("ab", 2)


def test_include_stop_keeps_the_string_and_nothing_after_it() -> None:
    table = (*BYTE_TABLE.tokens, b"one STOP two")
    completion = CompletionText(Spelling(table), ["STOP"], include_stop=True)
    assert completion.feed([256, ord("x")]) == "one STOP"
    assert completion.num_tokens == 1


def test_a_character_left_incomplete_becomes_a_replacement_character() -> None:
    completion = CompletionText(BYTE_TABLE, ["zz"])
    assert completion.feed(b"z" + "日".encode()[:2]) == ""
    assert completion.flush() == "z\ufffd"


def test_a_stop_string_that_is_a_special_token_left_out_ends_at_the_token() -> None:
    stop_ids = {300: "<|end|>"}

    def completion(**more: bool | int) -> CompletionText:
        return CompletionText(BYTE_TABLE, ["<|end|>", "zz"], stop_ids=stop_ids, **more)

    ended = completion()
    assert ended.feed([ord("a"), ord("z"), 300, ord("b")]) == "az"
    assert (ended.stop, ended.num_tokens) == ("<|end|>", 3)
    kept = completion(include_stop=True)
    assert kept.feed([ord("a"), 300]) == "a<|end|>"
    early = completion(min_tokens=3)
    assert early.feed([300, ord("a"), ord("b")]) == "ab"
    assert early.stop is None
    spelled = completion()
    assert spelled.feed(b"a<|end|>b") == "a"
    assert spelled.stop == "<|end|>"
