"""Ids equal to those of the `tokenizers` library, whichever backend makes them."""

import inspect
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoinfer_tokenizer.byte_level import (
    ByteLevelEncoding,
    UnrepresentableError,
    convert_ranks,
    spec_from_ranks,
)
from nanoinfer_tokenizer.decoders import read_vocabulary
from nanoinfer_tokenizer.document import read_added_tokens
from nanoinfer_tokenizer.encodings import (
    AddedToken,
    AddedTokens,
    TokenizerFileError,
    UnknownTokenIdError,
    encode_with_control,
    is_markup,
    longest_of,
)
from nanoinfer_tokenizer.library import LibraryEncoding
from nanoinfer_tokenizer.loading import LoadedTokenizer, load_tokenizer
from nanoinfer_tokenizer.streaming import StreamDecoder
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.tokenizer.conftest import decode
from tests.tokenizer.conversations import FRAGMENTS
from tests.tokenizer.tiny_tokenizers import FAMILIES, TEXTS

Load = Callable[[str], LoadedTokenizer]
Reference = Callable[[str], Tokenizer]

SPECIAL_LOOKING = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<s>"]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*FRAGMENTS, *SPECIAL_LOOKING]), max_size=40).map("".join),
    st.lists(st.sampled_from(sorted(set("".join(TEXTS)))), max_size=80).map("".join),
)


def corpus(size: int) -> Iterator[str]:
    """Code, prose in many scripts, runs of white space and random characters of every plane."""
    generator = random.Random(7)
    code = "".join(inspect.getsource(module) for module in (json, inspect, random))
    alphabet = "".join(TEXTS)
    planes = [(0x20, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(size):
        start = generator.randrange(len(code))
        yield code[start : start + generator.randrange(300)]
        yield "".join(generator.choices(alphabet, k=generator.randrange(1, 80)))
        yield "".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 40)))
        yield "".join(
            chr(generator.randint(*generator.choice(planes)))
            for _ in range(generator.randrange(40))
        )
        yield "".join(generator.choices(" \n\t\r", k=generator.randrange(1, 60)))
    yield code
    yield alphabet * 20


@pytest.mark.parametrize("family", FAMILIES)
def test_tiktoken_gives_the_librarys_ids(family: str, loaded: Load, reference: Reference) -> None:
    encoding = loaded(family).encoding
    assert encoding.info.backend == "tiktoken"
    texts = list(corpus(600))
    theirs = reference(family).encode_batch(texts, add_special_tokens=False)
    for text, expected in zip(texts, theirs, strict=True):
        assert encoding.encode(text) == expected.ids, text


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_any_text_gives_the_librarys_ids(
    family: str, text: str, loaded: Load, reference: Reference
) -> None:
    tokenizer = loaded(family)
    expected = reference(family).encode(text)
    assert tokenizer.frame.around(tokenizer.encoding.encode(text)) == expected.ids
    vocabulary = tokenizer.encoding.vocabulary
    if family not in ("qwen2", "qwen3"):  # NFC changes text
        assert decode(vocabulary, expected.ids, skip_special=True) == text


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_plain_text_never_gives_a_control_token(family: str, text: str, loaded: Load) -> None:
    encoding = loaded(family).encoding
    control = {token.id for token in encoding.control.tokens.values()}
    assert control.isdisjoint(encoding.encode(text))
    assert control >= set(encoding.vocabulary.special)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_alone(family: str, loaded: Load, reference: Reference) -> None:
    encoding = loaded(family).encoding
    for data in encoding.vocabulary.spelling.tokens:
        text = data.decode(errors="ignore")
        assert encoding.encode(text) == reference(family).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_arise_from_a_template_only(family: str, loaded: Load) -> None:
    encoding = loaded(family).encoding
    for text, token in encoding.control.tokens.items():
        token_id = token.id
        around = f"a{text} b"
        plain = encoding.encode(around)
        assert token_id not in plain
        assert decode(encoding.vocabulary, plain) == around
        expected = [*encoding.encode("a"), token_id, *encoding.encode(" b")]
        assert encode_with_control(encoding, around) == expected


def test_markup_that_the_file_does_not_call_special_is_a_control_token_too(
    loaded: Load, reference: Reference
) -> None:
    encoding = loaded("qwen3").encoding
    think = reference("qwen3").token_to_id("<think>")
    assert think not in encoding.encode("a<think>b")
    assert encode_with_control(encoding, "a<think>b").count(think) == 1
    assert think not in encoding.vocabulary.special


# --- what tiktoken cannot represent ---


def document_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "tokenizer.json").read_text()))


def write(path: Path, document: dict[str, Any]) -> Path:
    file = path / "tokenizer.json"
    file.write_text(json.dumps(document, ensure_ascii=False))
    return file


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "normalizer": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "add_prefix_space": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "unknown pattern": lambda d: d.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"\d"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                d["pre_tokenizer"] | {"use_regex": False},
            ],
        }
    ),
    "single_word": lambda d: d["added_tokens"].append(
        {
            "id": 701,
            "content": "fox",
            "special": False,
            "single_word": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
        }
    ),
    "merge order": lambda d: d["model"]["merges"].reverse(),
    "byte_fallback": lambda d: d["model"].update(byte_fallback=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_byte_level_tokenizers_use_the_library(
    change: str, directory_of: Callable[[str], Path], tmp_path: Path
) -> None:
    document = document_of(directory_of("gpt2"))
    CHANGES[change](document)
    file = write(tmp_path, document)
    encoding = load_tokenizer(file).encoding
    assert encoding.info.backend == "tokenizers"
    theirs = Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True
    for text in corpus(50):
        assert encoding.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert 700 not in encoding.encode("a<|endoftext|>b")
    assert encode_with_control(encoding, "<|endoftext|>") == [700]


def sentencepiece_like(kind: str) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        tokenizer.normalizer = normalizers.NFKC()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        )
    scheme = "first" if kind == "bpe" else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_like_tokenizers_use_the_library(kind: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(kind)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    document = json.loads(file.read_text())
    for entry in document["added_tokens"]:  # byte pieces are ordinary vocabulary
        entry["special"] = not entry["content"].startswith("<0x")
    document["added_tokens"] = [entry for entry in document["added_tokens"] if entry["special"]]
    encoding = load_tokenizer(write(tmp_path, document)).encoding
    theirs = Tokenizer.from_file(str(file))
    assert encoding.info.backend == "tokenizers"
    for text in corpus(50):
        assert encoding.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    for text in ("</s>", " <s> ", "x</s>", "<unk>", "\uff1c/s\uff1e"):
        assert not {1, 2} & set(encoding.encode(text))
    whole = "<s>The quick</s> brown<s>"
    assert (
        encode_with_control(encoding, whole) == theirs.encode(whole, add_special_tokens=False).ids
    )
    plain = encoding.encode("The quick fox\n")
    if kind == "bpe":
        assert decode(encoding.vocabulary, plain) == "The quick fox\n"


FUSE = {"type": "Fuse"}
FALLBACK = {"type": "ByteFallback"}
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
PIECES = [
    "a",
    "▁b",
    "▁",
    "▁▁",
    " c",
    "é",
    *(f"<0x{byte:02X}>" for byte in "é日".encode()),
    "<0x20>",
]


def strip(num: int) -> dict[str, Any]:
    return {"type": "Strip", "content": " ", "start": num, "stop": 0}


STREAMABLE: list[list[dict[str, Any]]] = [
    [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}],
    [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}],
    [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}, FALLBACK],
    [REPLACE, FALLBACK],
    [REPLACE, FALLBACK, FUSE],
    [REPLACE, FALLBACK, FUSE, strip(1)],
    [REPLACE, FALLBACK, FUSE, strip(1), strip(2)],
    [FALLBACK, FUSE, strip(3)],
    [FUSE],
]


@settings(max_examples=300, deadline=None)
@given(
    steps=st.sampled_from(STREAMABLE),
    ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=10),
    cut=st.integers(0, 10),
)
def test_every_decoder_that_is_served_decodes_as_the_library(
    steps: list[dict[str, Any]], ids: list[int], cut: int
) -> None:
    decoder = {"type": "Sequence", "decoders": steps}
    vocab = {piece: token_id for token_id, piece in enumerate(PIECES)}
    document = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "decoder": decoder}
    theirs = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **document}))
    vocabulary = read_vocabulary(document, dict(enumerate(PIECES)), [])
    stream = StreamDecoder(vocabulary, skip_special=True)
    text = stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.finish()
    assert text == theirs.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [FUSE, REPLACE]},
        {"type": "Sequence", "decoders": [FALLBACK, REPLACE]},
        {"type": "Sequence", "decoders": [strip(1), FALLBACK, FUSE]},
        {"type": "Sequence", "decoders": [FUSE, {**strip(1), "content": "a"}]},
        {"type": "Sequence", "decoders": [FUSE, {**strip(1), "stop": 1}]},
        {"type": "Sequence", "decoders": [{**REPLACE, "pattern": {"Regex": "a+"}}]},
        {"type": "Sequence", "decoders": []},
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(
    decoder: dict[str, Any], directory_of: Callable[[str], Path], tmp_path: Path
) -> None:
    document = document_of(directory_of("gpt2"))
    document["decoder"] = decoder
    document["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(TokenizerFileError, match="decoder"):
        load_tokenizer(write(tmp_path, document))


# --- conversion of merges ---


def ranks_of(pieces: list[str], merges: list[tuple[str, str]], **options: bool) -> dict[bytes, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: token_id for token_id, piece in enumerate([*alphabet, *pieces])}
    return convert_ranks(vocabulary, merges, **{"ignore_merges": False, **options})


def test_tokens_that_merges_do_not_make_are_left_out() -> None:
    # "abc" is a merge of "ab" and "c", but "bc" is merged first.
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    ranks = ranks_of(["bc", "ab", "abc", "xyz"], merges)
    assert b"bc" in ranks
    assert b"abc" not in ranks
    assert b"xyz" not in ranks


def test_tokens_taken_whole_stay_where_no_parts_join_to_them() -> None:
    assert b"xyz" in ranks_of(["xyz"], [], ignore_merges=True)


def test_parts_that_would_join_without_a_merge_are_not_representable() -> None:
    with pytest.raises(UnrepresentableError, match="no merge"):
        ranks_of(["xy"], [], ignore_merges=True)


def test_merges_out_of_id_order_are_not_representable() -> None:
    with pytest.raises(UnrepresentableError, match="order"):
        ranks_of(["ab", "cd"], [("c", "d"), ("a", "b")])


def test_missing_bytes_are_not_representable() -> None:
    with pytest.raises(UnrepresentableError, match="256 bytes"):
        convert_ranks({"a": 0, "b": 1}, [], ignore_merges=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_converted_or_refused_never_wrong(data: st.DataObject) -> None:
    """Random merge lists over three letters: either refused, or equal ids for every short text."""
    pieces = list("abc")
    merges: list[tuple[str, str]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        pair = data.draw(st.tuples(st.sampled_from(pieces), st.sampled_from(pieces)))
        merges.append(pair)
        if "".join(pair) not in pieces:
            pieces.append("".join(pair))
    ignore_merges = data.draw(st.booleans())
    extra = data.draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=3))
    products = [piece for piece in dict.fromkeys([*pieces[3:], *extra])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: token_id for token_id, piece in enumerate([*alphabet, *products])}
    merges.sort(key=lambda pair: vocabulary["".join(pair)])
    theirs = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    try:
        ranks = convert_ranks(vocabulary, merges, ignore_merges=ignore_merges)
    except UnrepresentableError:
        return
    ours = ByteLevelEncoding(spec_from_ranks(ranks, "gpt2", []))
    for _ in range(40):
        text = data.draw(st.text("abc", min_size=1, max_size=14))
        assert ours.encode(text) == [token.id for token in theirs.tokenize(text)]


# --- added tokens ---


@settings(max_examples=300, deadline=None)
@given(
    words=st.sets(st.text("ab<|", min_size=1, max_size=5), max_size=12),
    text=st.text("ab<|", max_size=30),
)
def test_the_longest_word_is_found_as_among_all_in_turn(words: set[str], text: str) -> None:
    in_turn = "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"
    assert re.findall(longest_of(words), text) == re.findall(in_turn, text)


def test_words_that_begin_one_another_a_thousand_times_are_found() -> None:
    words = ["x" * size for size in range(1, 2001)]
    match = re.match(longest_of(words), "x" * 1999 + "y")
    assert match is not None
    assert match.end() == 1999


@pytest.mark.parametrize(
    ("content", "template", "expected"),
    [
        ("<think>", "", True),
        ("<｜Assistant｜>", "", True),
        ("[INST]", "", True),
        ("<0x0A>", "", True),
        ("### Response:", "", True),
        ("Response:", "", False),
        ("Response:", "{{ '\\nResponse:' }}", True),
        ("Zürich", "", False),
        ("Zürich", "{{ 'Zürich' }}", True),
        ("😀", "", False),
        ("...", "", False),
        ("\n\n", "\n\n", False),
        ("▁▁", "▁▁", False),
        ("", "", False),
    ],
)
def test_which_added_tokens_are_markup(content: str, template: str, expected: bool) -> None:
    assert is_markup(content, template) is expected


def test_added_tokens_leftmost_then_longest_with_their_flags() -> None:
    tokens = AddedTokens(
        [
            AddedToken(0, "<a>"),
            AddedToken(1, "<a><b>"),
            AddedToken(2, "<l>", lstrip=True),
            AddedToken(3, "<r>", rstrip=True),
            AddedToken(4, "word", single_word=True),
            AddedToken(5, ""),
        ],
        hidden=[AddedToken(6, "<a><b><c>")],
    )
    assert list(tokens.split("x<a><b>y<a>")) == ["x", 1, "y", 0]
    assert list(tokens.split("x \u00a0\n<l> y")) == ["x", 2, " y"]
    assert list(tokens.split("x <r> \t\u3000y")) == ["x ", 3, "y"]
    assert list(tokens.split("word wordy sword")) == [4, " wordy sword"]
    assert list(tokens.split("<a><b><c>")) == ["<a><b><c>"]
    assert list(tokens.split("")) == []
    assert list(AddedTokens([]).split("text")) == ["text"]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(["<a>", "<a><b>", " ", "\n", "x", "\x1c", "<", "\u3000"])))
def test_added_tokens_are_found_as_the_library_finds_them(parts: list[str]) -> None:
    text = "".join(parts)
    theirs = Tokenizer(models.BPE(vocab={}, merges=[]))
    described = [
        {"content": "<a>", "lstrip": True, "rstrip": False},
        {"content": "<a><b>", "lstrip": False, "rstrip": True},
    ]
    theirs.add_special_tokens([tokenizers.AddedToken(**token, special=True) for token in described])
    ours = AddedTokens([AddedToken(i, **token) for i, token in enumerate(described)])
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert [part for part in ours.split(text) if isinstance(part, int)] == expected


def test_ids_outside_the_vocabulary_are_named(loaded: Load) -> None:
    vocabulary = loaded("gpt2").encoding.vocabulary
    for bad in (-1, len(vocabulary.spelling.tokens), 2**32 - 1):
        with pytest.raises(UnknownTokenIdError, match=str(bad)):
            vocabulary.check([0, bad, 1])
    assert decode(vocabulary, []) == ""


def test_the_library_is_told_why(directory_of: Callable[[str], Path]) -> None:
    document = document_of(directory_of("gpt2"))
    encoding = LibraryEncoding(document, read_added_tokens(document), "because")
    assert encoding.info.reason == "because"
