"""The parts of a Hugging Face `tokenizer.json` that both backends read the same way."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanoinfer_tokenizer.encodings import AddedToken, Frame, TokenizerFileError, Vocabulary

Document = Mapping[str, Any]

SPACE_SIGN = "\u2581"  # how SentencePiece writes a space


def _byte_characters() -> dict[int, int]:
    """Inverts GPT-2's byte alphabet: printable bytes stand for themselves, others for U+0100 up.

    What is no character of the alphabet maps to one that latin-1 lacks.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    shifted = {0x100 + index: byte for index, byte in enumerate(others)}
    return dict.fromkeys(others, 0x100) | shifted


_BYTE_OF = _byte_characters()
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_bytes(piece: str) -> bytes | None:
    """Gives the bytes that a byte-level piece stands for; None where it is no such piece."""
    try:
        return piece.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return None


def spelled_bytes(piece: str) -> bytes:
    """Gives the bytes of a SentencePiece-style piece: `<0x0A>` is a byte, `SPACE_SIGN` a space."""
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace(SPACE_SIGN, " ").encode()


def flatten(part: Document | None, children: str) -> list[Document]:
    """Lists the steps of a pipeline part, which may be absent, single or a nested `Sequence`."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for child in part[children] for step in flatten(child, children)]


def read_added_tokens(document: Document) -> list[AddedToken]:
    """Reads `added_tokens`. Raises `TokenizerFileError` for an entry of another form."""
    fields = AddedToken.__slots__
    try:
        return [
            AddedToken(**{name: entry[name] for name in fields if name in entry})
            for entry in document.get("added_tokens") or ()
        ]
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


def build_vocabulary(tokens: Mapping[int, bytes], added_tokens: Iterable[AddedToken]) -> Vocabulary:
    """Lays out the byte table; an added token's bytes are those of its text."""
    table = dict(tokens)
    added = list(added_tokens)
    table.update({token.id: token.content.encode() for token in added})
    if not table or min(table) < 0:
        raise TokenizerFileError("the vocabulary is empty or has a negative id")
    if max(table) >= 4 * len(table) + 1024:
        raise TokenizerFileError(f"the vocabulary has {len(table)} tokens but ids to {max(table)}")
    return Vocabulary(
        tokens=tuple(table.get(token_id, b"") for token_id in range(max(table) + 1)),
        special={token.id: token.content for token in added if token.special},
    )


def read_merges(model: Document) -> list[tuple[str, str]]:
    """Reads a BPE model's merges, written as pairs or as strings with one space."""
    merges: Sequence[Any] = model.get("merges") or ()
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise TokenizerFileError("a merge is not a pair")
    return [(left, right) for left, right in pairs]
