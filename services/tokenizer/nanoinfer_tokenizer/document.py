"""The parts of a Hugging Face `tokenizer.json` that both backends read the same way."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanoinfer_tokenizer.encodings import AddedToken, Frame, TokenizerFileError, is_markup

Document = Mapping[str, Any]

_ADDED_FIELDS = ("id", "content", "special", "normalized", "lstrip", "rstrip", "single_word")


def _byte_characters() -> dict[int, int]:
    """Inverts GPT-2's byte alphabet: printable bytes stand for themselves, others for U+0100 up.

    What is no character of the alphabet maps to one that latin-1 lacks.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    shifted = {0x100 + index: byte for index, byte in enumerate(others)}
    return dict.fromkeys(others, 0x100) | shifted


_BYTE_OF = _byte_characters()


def byte_level_bytes(piece: str) -> bytes | None:
    """Gives the bytes that a byte-level piece stands for; None where it is no such piece."""
    try:
        return piece.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return None


def flatten(part: Document | None, children: str) -> list[Document]:
    """Lists the steps of a pipeline part, which may be absent, single or a nested `Sequence`."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for child in part[children] for step in flatten(child, children)]


def read_added_tokens(document: Document, template: str = "") -> list[AddedToken]:
    """Reads `added_tokens`; `template` is the chat template, which may make markup of them.

    Raises `TokenizerFileError` for an entry of another form.
    """
    try:
        tokens = [
            AddedToken(**{name: entry[name] for name in _ADDED_FIELDS if name in entry})
            for entry in document.get("added_tokens") or ()
        ]
        return [replace(token, markup=is_markup(token.content, template)) for token in tokens]
    except (TypeError, KeyError, AttributeError) as error:
        raise TokenizerFileError("added_tokens has an entry of unknown form") from error


def read_frame(document: Document) -> Frame:
    """Reads what the post-processor puts around a single text.

    Raises `TokenizerFileError` for a post-processor that does more than that.
    """
    prefix: list[int] = []
    suffix: list[int] = []
    for step in flatten(document.get("post_processor"), "processors"):
        kind = step.get("type")
        if kind == "TemplateProcessing":
            before, after = _template_frame(step)
        elif kind in ("BertProcessing", "RobertaProcessing"):
            before, after = [int(step["cls"][1])], [int(step["sep"][1])]
        elif kind == "ByteLevel":
            continue
        else:
            raise TokenizerFileError(f"post-processor {kind} is unknown")
        prefix, suffix = before + prefix, suffix + after
    return Frame(tuple(prefix), tuple(suffix))


def _template_frame(step: Document) -> tuple[list[int], list[int]]:
    before: list[int] = []
    after: list[int] = []
    target = before
    for item in step["single"]:
        if "Sequence" in item:
            target = after
        else:
            target.extend(step["special_tokens"][item["SpecialToken"]["id"]]["ids"])
    return before, after


def build_table(tokens: Mapping[int, bytes]) -> tuple[bytes, ...]:
    """Lays tokens out by id, with nothing for an id without a token."""
    if not tokens or min(tokens) < 0:
        raise TokenizerFileError("the vocabulary is empty or has a negative id")
    num_tokens, last = len(tokens), max(tokens)
    if last >= 4 * num_tokens + 1024:
        raise TokenizerFileError(f"the vocabulary has {num_tokens} tokens but ids to {last}")
    return tuple(tokens.get(token_id, b"") for token_id in range(max(tokens) + 1))


def read_merges(model: Document) -> list[tuple[str, str]]:
    """Reads a BPE model's merges, written as pairs or as strings with one space."""
    merges: Sequence[Any] = model.get("merges") or ()
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise TokenizerFileError("a merge is not a pair")
    return [(left, right) for left, right in pairs]
