from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoinfer_common.detokenize import Spelling
from nanoinfer_tokenizer.encodings import UnknownTokenIdError, Vocabulary
from nanoinfer_tokenizer.loading import LoadedTokenizer
from nanoinfer_tokenizer.streaming import StreamDecoder

BYTES = Vocabulary(Spelling(tuple(bytes([byte]) for byte in range(256))), {})


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=8))
def test_pieces_join_to_the_whole_and_end_on_characters(data: bytes, cuts: list[int]) -> None:
    decoder = StreamDecoder(BYTES, skip_special=True)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [decoder.push(data[start:end]) for start, end in pairwise(edges)]
    text = "".join(pieces) + decoder.finish()
    assert text == data.decode(errors="replace")


def test_an_incomplete_character_waits_and_ends_as_replacement() -> None:
    decoder = StreamDecoder(BYTES, skip_special=True)
    family = "👩‍👩‍👧".encode()
    assert [decoder.push([byte]) for byte in family[:4]] == ["", "", "", "👩"]
    assert decoder.push(family[4:6]) == ""
    assert decoder.finish() == "\ufffd"


def test_special_tokens_are_left_out_or_kept(loaded: Callable[[str], LoadedTokenizer]) -> None:
    encoding = loaded("qwen2").encoding
    ids = [701, *encoding.encode("hé"), 702]
    assert StreamDecoder(encoding.vocabulary, skip_special=True).push(ids) == "hé"
    kept = StreamDecoder(encoding.vocabulary, skip_special=False).push(ids)
    assert kept == "<|im_start|>hé<|im_end|>"


def test_an_unknown_id_is_refused_and_leaves_the_stream_as_it_was() -> None:
    decoder = StreamDecoder(BYTES, skip_special=True)
    assert decoder.push([0xC3]) == ""
    with pytest.raises(UnknownTokenIdError):
        decoder.push([0x61, 256])
    assert decoder.push([0xA9]) == "é"
