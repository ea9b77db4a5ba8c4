"""What one process serves: a tokenizer, its fingerprint and its chat template."""

import hashlib
from dataclasses import dataclass

from nanoinfer_common.fingerprint import tokenizer_fingerprint

from nanoinfer_tokenizer.chat import ChatRenderer
from nanoinfer_tokenizer.encodings import Encoding, TokenizerFileError, Vocabulary
from nanoinfer_tokenizer.loading import LoadedTokenizer, load_tokenizer
from nanoinfer_tokenizer.settings import TokenizerSettings


@dataclass(frozen=True)
class Served:
    """A loaded model. `chat` is None where it has no chat template."""

    tokenizer: LoadedTokenizer
    fingerprint: bytes
    chat: ChatRenderer | None

    @property
    def encoding(self) -> Encoding:
        """What encodes."""
        return self.tokenizer.encoding

    @property
    def vocabulary(self) -> Vocabulary:
        """The byte table."""
        return self.tokenizer.encoding.vocabulary


def load_served(settings: TokenizerSettings) -> Served:
    """Loads what `settings` name. Raises `TokenizerFileError` where that cannot be served."""
    path = settings.tokenizer_path
    tokenizer = load_tokenizer(path, settings.rank_file, settings.model)
    fingerprint = tokenizer_fingerprint(path)
    if fingerprint is None:
        raise TokenizerFileError(f"{path} has no tokenizer to fingerprint")
    if settings.rank_file is not None:
        # What changes ids or special tokens makes another tokenizer of the same file.
        fingerprint = hashlib.sha256(fingerprint + repr(settings.rank_file).encode()).digest()
    chat = None
    if tokenizer.chat_template is not None:
        chat = ChatRenderer(tokenizer.chat_template, tokenizer, settings.template_limits)
    return Served(tokenizer, fingerprint, chat)
