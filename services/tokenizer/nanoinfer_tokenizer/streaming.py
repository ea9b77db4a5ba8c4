"""Ids that arrive piece by piece, as text that ends on character boundaries."""

import codecs
from collections.abc import Sequence

from nanoinfer_tokenizer.encodings import Vocabulary


class StreamDecoder:
    """Decodes one stream of ids. Bytes of an incomplete character wait for the rest of it."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool) -> None:
        """Starts a stream over `vocabulary`."""
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """Gives the text that `token_ids` complete. Raises `UnknownTokenIdError`."""
        data = self._vocabulary.to_bytes(token_ids, skip_special=self._skip_special)
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Ends the stream: what is still incomplete becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
