"""Every other tokenizer, on the `tokenizers` library.

The library itself keeps special tokens out of plain text only where its model cannot find their
text in the vocabulary. So this module loads a copy of the tokenizer in which that text is gone.
"""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

from nanoinfer_tokenizer.document import (
    SPACE_SIGN,
    Document,
    build_vocabulary,
    byte_level_bytes,
    flatten,
    read_added_tokens,
    read_merges,
    spelled_bytes,
)
from nanoinfer_tokenizer.encodings import (
    AddedToken,
    AddedTokens,
    EncodingInfo,
    TokenizerFileError,
    Vocabulary,
)

# Put before a special token's text in the model's vocabulary; a noncharacter, so text lacks it.
_HIDDEN = "\U0010ffff"


class LibraryEncoding:
    """Encodes with the `tokenizers` library; `reason` says why it is not tiktoken that does."""

    def __init__(self, document: Document, reason: str) -> None:
        """Loads `document`. Raises `TokenizerFileError` where it cannot be served."""
        added_tokens = read_added_tokens(document)
        special = [token for token in added_tokens if token.special]
        plain = _without_special(document, {token.content for token in special})
        self.info = EncodingInfo("tokenizers", reason)
        self.special = AddedTokens(special)
        text = json.dumps(plain)
        # "first" means the first word of the input, not of each run between special tokens.
        later = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        self._first = _load(text)
        self._later = self._first if later == text else _load(later)
        self.vocabulary = _read_vocabulary(document, added_tokens)
        # Without the special tokens the library may number those that remain anew.
        self._renumbered = {
            self._first.token_to_id(token.content): token.id
            for token in added_tokens
            if not token.special and self._first.token_to_id(token.content) != token.id
        }

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Encodes plain text; `continues` matters to models that mark the first word."""
        tokenizer = self._later if continues else self._first
        # `encode` holds the interpreter's lock all the time; this lets other threads run, does not
        # compute offsets, and works in the calling thread where the batch is a single text.
        (encoded,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        token_ids: list[int] = encoded.ids
        if self._renumbered:
            return [self._renumbered.get(token_id, token_id) for token_id in token_ids]
        return token_ids


def _load(text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise TokenizerFileError(f"the tokenizers library refuses it: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_special(document: Document, special: set[str]) -> dict[str, Any]:
    """Copies `document` without special tokens: neither matched in text nor known to the model."""
    plain = copy.deepcopy(dict(document))
    plain["post_processor"] = None
    plain["added_tokens"] = [
        entry for entry in plain.get("added_tokens") or () if entry["content"] not in special
    ]
    model = plain["model"]
    if model.get("merges"):
        merged = {left + right for left, right in read_merges(model)}
        if special & merged:
            raise TokenizerFileError(f"special tokens {sorted(special & merged)} are merged text")

    def rename(piece: str) -> str:
        return _HIDDEN + piece if piece in special else piece

    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {rename(piece): token_id for piece, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[rename(piece), score] for piece, score in vocabulary]
    if model.get("unk_token"):
        model["unk_token"] = rename(model["unk_token"])
    return plain


def _read_vocabulary(document: Document, added_tokens: list[AddedToken]) -> Vocabulary:
    pieces = document["model"].get("vocab") or {}
    if isinstance(pieces, list):
        pieces = {piece: token_id for token_id, (piece, _) in enumerate(pieces)}
    spell = _spelling(document)
    return build_vocabulary(
        {token_id: spell(piece) for piece, token_id in pieces.items()}, added_tokens
    )


def _spelling(document: Document) -> Callable[[str], bytes]:
    """Chooses how a piece is spelled in bytes. Raises where bytes depend on the neighbours."""
    steps: list[Mapping[str, Any]] = flatten(document.get("decoder"), "decoders")
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return lambda piece: byte_level_bytes(piece) or piece.encode()
    # Strip takes a text's first space away: part of a text's frame, not of a token.
    known = kinds and kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    signs = {step.get("replacement") for step in steps if step.get("type") == "Metaspace"}
    signs |= {step["pattern"].get("String") for step in steps if step.get("type") == "Replace"}
    if known and signs == {SPACE_SIGN}:
        return spelled_bytes
    raise TokenizerFileError(f"decoder {sorted(map(str, kinds))} has no bytes for single tokens")
