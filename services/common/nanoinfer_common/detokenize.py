"""Token ids to text, piece by piece, as the `tokenizers` library decodes the whole.

The tokenizer and the gateway decode by these rules; the former publishes them with its vocabulary.
Most tokens are spelled alike everywhere. What depends on a token's neighbours is said in
`Spelling`: runs of byte tokens, and the beginning of a text.
"""

import codecs
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

_REPLACEMENT = "\ufffd".encode()


@dataclass(frozen=True, slots=True)
class Spelling:
    """Bytes by id (empty for an id without text), and what depends on an id's neighbours.

    `byte_ids` are tokens of one byte each, in a vocabulary of text: a run of them is text where it
    is UTF-8 as a whole, and one U+FFFD a token otherwise. `first_tokens` are spelled in another way
    where they begin a text. A text loses up to `strip_leading_spaces` spaces at its beginning.
    """

    tokens: tuple[bytes, ...]
    byte_ids: frozenset[int] = frozenset()
    first_tokens: Mapping[int, bytes] = field(default_factory=dict)
    strip_leading_spaces: int = 0

    def without(self, token_ids: Collection[int]) -> Self:
        """Gives the same spelling with `token_ids` left out of every text."""
        left_out = frozenset(token_ids)
        table = tuple(b"" if i in left_out else token for i, token in enumerate(self.tokens))
        return replace(self, tokens=table)


class _ByteRun:
    """Consecutive byte tokens. `spaces` is how many spaces the text may still lose before them."""

    def __init__(self, spaces: int) -> None:
        self._data = bytearray()
        self._num_seen = 0
        self._spaces = spaces
        self._is_text = True
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def __bool__(self) -> bool:
        return bool(self._data)

    def add(self, byte: bytes) -> None:
        self._data += byte

    def bytes_of_text(self) -> bytes:
        try:
            self._data.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(self._data)
        return bytes(self._data)

    def look_ahead(self) -> str:
        new, self._num_seen = bytes(self._data[self._num_seen :]), len(self._data)
        try:
            text = self._decoder.decode(new) if self._is_text else ""
        except UnicodeDecodeError:
            self._is_text, text = False, ""
        text, self._spaces = _strip(text, self._spaces)
        return text


class TextDecoder:
    """Decodes one text's ids as they come. Bytes of an incomplete character wait for the rest.

    A run of byte tokens waits until another token ends it, because its last byte decides about the
    first. Ids beyond the table, which a model padded to a round vocabulary size can produce, have
    no text. Where something stood before the text, `continues` keeps the rules of a text's
    beginning away.
    """

    def __init__(self, spelling: Spelling, *, continues: bool = False) -> None:
        """Starts a text."""
        self._table = spelling.tokens
        self._byte_ids = spelling.byte_ids
        self._first_tokens: Mapping[int, bytes] = {} if continues else spelling.first_tokens
        self._spaces = 0 if continues else spelling.strip_leading_spaces
        self._run = _ByteRun(0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        """Gives the text that these ids make certain; the rest waits."""
        table = self._table
        size = len(table)
        at_start = self._first_tokens or self._spaces
        if not (self._run or at_start) and self._byte_ids.isdisjoint(token_ids):
            return self._decoder.decode(b"".join([table[i] for i in token_ids if i < size]))
        pieces: list[str] = []
        for token_id in token_ids:
            token = table[token_id] if token_id < size else b""
            if not token:
                continue
            if token_id in self._byte_ids:
                if not self._run:
                    self._run = _ByteRun(self._spaces)
                self._run.add(token)
            else:
                pieces.append(self._end_run())
                pieces.append(self._decode(self._first_tokens.get(token_id, token)))
            self._first_tokens = {}
        return "".join(pieces)

    def feed_run_before(self, token_id: int) -> str:
        """Gives the text of the byte tokens that wait, where `token_id` ends them."""
        has_text = token_id < len(self._table) and bool(self._table[token_id])
        return self._end_run() if has_text and token_id not in self._byte_ids else ""

    def look_ahead(self) -> str:
        """Gives the characters of waiting byte tokens that no earlier call gave.

        They are the text, unless bytes that are not UTF-8 follow.
        """
        return self._run.look_ahead()

    def flush(self) -> str:
        """Ends the text: a character that stayed incomplete becomes U+FFFD."""
        return self._end_run() + self._decode(b"", final=True)

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run, self._run = self._run, _ByteRun(0)
        return self._decode(run.bytes_of_text())

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        text, self._spaces = _strip(self._decoder.decode(data, final), self._spaces)
        return text


def _strip(text: str, spaces: int) -> tuple[str, int]:
    """Takes up to `spaces` spaces from the beginning; also gives how many may still be taken."""
    while spaces and text.startswith(" "):
        text, spaces = text[1:], spaces - 1
    return text, 0 if text else spaces
