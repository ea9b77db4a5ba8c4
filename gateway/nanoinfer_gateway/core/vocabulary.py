"""The spelling of the tokenizer's vocabulary, fetched once per fingerprint and kept.

The tokenizer stays the authority: a fingerprint that has not been seen is fetched from it, by one
call however many requests wait. Knows no proto.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
from nanoinfer_common import names
from nanoinfer_common.detokenize import Spelling
from nanoinfer_common.errors import ServiceError, precondition

MAX_FETCHES = 4  # several tokenizers of different fingerprints may answer during a rolling update
MAX_KEPT = 4

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """How ids are spelled, the special ids, the 32-byte fingerprint.

    `eos_token_ids` are None where the tokenizer is too old to say them. `without_specials` is the
    same spelling with the special tokens left out of every text, `special_texts` maps the special
    tokens' texts to their ids.
    """

    fingerprint: bytes
    spelling: Spelling
    special_ids: frozenset[int]
    eos_token_ids: frozenset[int] | None = None
    without_specials: Spelling = field(init=False, repr=False)
    special_texts: dict[bytes, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokens = self.spelling.tokens
        object.__setattr__(self, "without_specials", self.spelling.without(self.special_ids))
        object.__setattr__(self, "special_texts", {tokens[i]: i for i in self.special_ids})

    def token(self, token_id: int) -> bytes:
        """Return an id's raw bytes; empty for an id that the tokenizer does not have."""
        tokens = self.spelling.tokens
        return tokens[token_id] if token_id < len(tokens) else b""


class Vocabularies:
    """Keeps the last few vocabularies; `fetch` gets the tokenizer's present one."""

    def __init__(self, fetch: Callable[[], Awaitable[Vocabulary]]) -> None:
        self._fetch = fetch
        self._kept: dict[bytes, Vocabulary] = {}
        self._fetching: asyncio.Task[Vocabulary] | None = None

    async def get(
        self, fingerprint: bytes | None = None, eos_token_ids: frozenset[int] | None = None
    ) -> Vocabulary:
        """Return the vocabulary of a fingerprint, or the newest where it is None.

        Raises FAILED_PRECONDITION (TOKENIZER_MISMATCH) where no tokenizer has it, or where its EOS
        ids are not the given ones, and what fetching raises.
        """
        vocabulary = await self._of(fingerprint)
        if eos_token_ids in (None, vocabulary.eos_token_ids) or vocabulary.eos_token_ids is None:
            return vocabulary
        # the tokenizer may have started again with other files beside the same tokenizer.json
        await self._fetch_once()
        vocabulary = await self._of(fingerprint)
        if vocabulary.eos_token_ids == eos_token_ids:
            return vocabulary
        raise precondition(
            names.TOKENIZER_MISMATCH,
            "tokenizer and engine disagree on the ids that end a text",
            tokenizerEos=_listed(vocabulary.eos_token_ids),
            engineEos=_listed(eos_token_ids),
        )

    async def _of(self, fingerprint: bytes | None) -> Vocabulary:
        if fingerprint is None:
            return next(reversed(self._kept.values())) if self._kept else await self._fetch_once()
        for _ in range(MAX_FETCHES):
            if fingerprint in self._kept:
                return self._kept[fingerprint]
            newest = await self._fetch_once()
        if newest.fingerprint == fingerprint:
            return newest
        raise precondition(
            names.TOKENIZER_MISMATCH,
            "the tokenizer's vocabulary is not the one that the ids belong to",
            expected=fingerprint.hex(),
            actual=newest.fingerprint.hex(),
        )

    def prefetch(self) -> None:
        """Begin to fetch where nothing is kept yet; the first `get` tries again what failed."""
        if not self._kept:
            self._fetch_in_background()

    async def close(self) -> None:
        """Cancel a fetch that is under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    async def _fetch_once(self) -> Vocabulary:
        """Join the fetch under way or start one; a waiter's cancel leaves it to the others."""
        return await asyncio.shield(self._fetch_in_background())

    def _fetch_in_background(self) -> asyncio.Task[Vocabulary]:
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch_and_keep())
            self._fetching.add_done_callback(_log_failure)
        return self._fetching

    async def _fetch_and_keep(self) -> Vocabulary:
        vocabulary = await self._fetch()
        self._kept.pop(vocabulary.fingerprint, None)
        self._kept[vocabulary.fingerprint] = vocabulary
        while len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return vocabulary


def _listed(token_ids: frozenset[int] | None) -> str:
    return ", ".join(map(str, sorted(token_ids or ())))


def _log_failure(task: asyncio.Task[Vocabulary]) -> None:
    """Log a failed fetch: those who wait are told, but nobody may be waiting."""
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, ServiceError):
        log.warning("vocabulary_not_fetched", reason=error.reason)
    else:
        log.error("vocabulary_not_fetched", exc_info=error)
