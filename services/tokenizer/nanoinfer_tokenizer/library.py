"""Every other tokenizer, on the `tokenizers` library.

The library itself keeps special tokens, and no others, out of plain text, and only where its model
cannot find their text in the vocabulary. So this module loads a copy of the tokenizer in which the
text of control tokens is gone.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from nanoinfer_tokenizer.decoders import read_vocabulary
from nanoinfer_tokenizer.document import Document, read_merges
from nanoinfer_tokenizer.encodings import (
    AddedToken,
    AddedTokens,
    EncodingInfo,
    TokenizerFileError,
)

# Put before a control token's text in the model's vocabulary; a noncharacter, so text lacks it.
_HIDDEN = "\U0010ffff"


class LibraryEncoding:
    """Encodes with the `tokenizers` library; `reason` says why it is not tiktoken that does."""

    def __init__(self, document: Document, added_tokens: Sequence[AddedToken], reason: str) -> None:
        """Loads `document`. Raises `TokenizerFileError` where it cannot be served."""
        control = [token for token in added_tokens if token.control]
        self.info = EncodingInfo("tokenizers", reason)
        self.control = AddedTokens(control)
        text = json.dumps(_without(document, frozenset(self.control.tokens)))
        # "first" means the first word of the input, not of each run between control tokens.
        later = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        self._first = _load(text)
        self._later = self._first if later == text else _load(later)
        self.vocabulary = read_vocabulary(document, _pieces(document), added_tokens)
        # Without the control tokens the library may number those that remain anew.
        self._renumbered = {
            self._first.token_to_id(token.content): token.id
            for token in added_tokens
            if not token.control and self._first.token_to_id(token.content) != token.id
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


def _without(document: Document, control: frozenset[str]) -> dict[str, Any]:
    """Copies `document` without control tokens: neither matched in text nor made by the model."""
    plain = dict(document)
    plain["post_processor"] = None
    plain["added_tokens"] = [
        entry for entry in plain.get("added_tokens") or () if entry["content"] not in control
    ]
    model = plain["model"] = dict(plain["model"])
    if model.get("merges"):
        model["merges"] = [
            [left, right]
            for left, right in read_merges(model)
            if control.isdisjoint((left, right, left + right))
        ]

    def rename(piece: str) -> str:
        return _HIDDEN + piece if piece in control else piece

    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {rename(piece): token_id for piece, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[rename(piece), score] for piece, score in vocabulary]
    if model.get("unk_token"):
        model["unk_token"] = rename(model["unk_token"])
    return plain


def _pieces(document: Document) -> dict[int, str]:
    pieces = document["model"].get("vocab") or {}
    if isinstance(pieces, list):
        return {token_id: piece for token_id, (piece, _) in enumerate(pieces)}
    return {token_id: piece for piece, token_id in pieces.items()}
