"""Ids that arrive piece by piece, as text that ends on character boundaries."""

from collections.abc import Sequence

from nanoinfer_common.detokenize import TextDecoder

from nanoinfer_tokenizer.encodings import Vocabulary


class StreamDecoder:
    """Decodes one stream of ids. What later ids could still change waits for them."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool) -> None:
        """Starts a stream over `vocabulary`."""
        self._vocabulary = vocabulary
        self._decoder = TextDecoder(
            vocabulary.without_special if skip_special else vocabulary.spelling
        )

    def push(self, token_ids: Sequence[int]) -> str:
        """Gives the text that `token_ids` complete. Raises `UnknownTokenIdError`."""
        self._vocabulary.check(token_ids)
        return self._decoder.feed(token_ids)

    def finish(self) -> str:
        """Ends the stream: what is still incomplete becomes U+FFFD."""
        return self._decoder.flush()
