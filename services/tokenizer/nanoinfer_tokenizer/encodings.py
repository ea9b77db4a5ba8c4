"""What every encoding offers, and the parts that both of them share.

An encoding turns text into ids. Text given to `encode` never yields a control token; only
`encode_with_control`, meant for rendered chat templates, does. Added tokens are found as the
`tokenizers` library finds them: leftmost, then longest, before any piece reaches the model.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Protocol

from nanoinfer_common.detokenize import Spelling

# The Unicode property White_Space; Python's \s and strip() would take U+001C to U+001F too.
_WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)
_NO_WHITE_SPACE = re.compile(f"[^{_WHITE_SPACE}]")
_RUN = 16_384  # characters that one call into C looks at: about a millisecond
_MAX_BRANCHING = 64  # levels of a pattern; the regular expression compiler recurses


class TokenizerFileError(ValueError):
    """A tokenizer's files are missing, damaged or of a kind that cannot be served."""


class UnknownTokenIdError(ValueError):
    """An id outside the vocabulary was to be decoded."""

    def __init__(self, token_id: int) -> None:
        """Remembers `token_id`."""
        super().__init__(f"token id {token_id} is outside the vocabulary")
        self.token_id = token_id


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in the text before the model sees it; `tokenizer.json` explains the flags.

    `markup` is ours: the token structures a prompt, though the file does not call it special.
    """

    id: int
    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    markup: bool = False

    @property
    def control(self) -> bool:
        """Whether plain text must never yield the token."""
        return self.special or self.markup


def is_markup(content: str, template: str) -> bool:
    """Tells whether an added token structures prompts: the template uses it, or it looks so.

    White space never does, and a word (a language's own, added for its text) only where the
    template has it. What has a sign on both sides, such as `<think>`, always does.
    """
    core = content.strip(_WHITE_SPACE + "\u2581")
    if not core:
        return False
    bracketed = not (core[0].isalnum() or core[-1].isalnum()) and any(map(str.isalnum, core))
    return bracketed or content in template


class AddedTokens:
    """Finds a set of added tokens in text. `hidden` ones are found too but stay text."""

    def __init__(self, tokens: Iterable[AddedToken], hidden: Iterable[AddedToken] = ()) -> None:
        """Prepares the search; tokens without content are never found."""
        self.tokens = {token.content: token for token in tokens if token.content}
        contents = {*self.tokens, *(token.content for token in hidden if token.content)}
        self._longest = max(map(len, contents), default=0)
        self._pattern = re.compile(longest_of(contents))

    def split(self, text: str) -> Iterator[str | int]:
        """Yields the non-empty runs of plain text and the ids between them, in order."""
        cursor = 0
        for match in self._matches(text) if self.tokens else ():
            token = self.tokens.get(match.group())
            start, end = match.span()
            if token is None or start < cursor or (token.single_word and _in_word(text, match)):
                continue
            if token.lstrip:
                start = cursor + len(text[cursor:start].rstrip(_WHITE_SPACE))
            if token.rstrip:
                beyond = _NO_WHITE_SPACE.search(text, end)
                end = beyond.start() if beyond else len(text)
            if cursor < start:
                yield text[cursor:start]
            yield token.id
            cursor = end
        if cursor < len(text):
            yield text[cursor:] if cursor else text

    def _matches(self, text: str) -> Iterator[re.Match[str]]:
        """Finds what `finditer` finds, in runs: a search lets no other thread in before its end."""
        position = 0
        while position < len(text):
            stop = position + _RUN
            match = self._pattern.search(text, position, stop + self._longest - 1)
            if match is None or match.start() >= stop:
                position = stop  # nothing starts before it; what starts behind may be cut off here
            else:
                yield match
                position = match.end()


def longest_of(words: Collection[str]) -> str:
    """Gives a pattern that finds the longest of `words` at a place, however many there are.

    It branches on one character after the other, so a place costs no more than the longest word.
    """
    return _branches(sorted(words), 0) if words else "(?!)"


def _branches(words: Sequence[str], depth: int) -> str:
    if depth == _MAX_BRANCHING:
        return f"(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})"
    parts = []
    for _, same in groupby(filter(None, words), key=itemgetter(0)):
        group = list(same)
        shared = _num_shared(group[0], group[-1])  # sorted: the others share as much
        rest = [word[shared:] for word in group]
        parts.append(
            re.escape(group[0][:shared]) + (_branches(rest, depth + 1) if any(rest) else "")
        )
    return f"(?:{'|'.join(parts)})" + ("" if all(words) else "?")


def _num_shared(first: str, last: str) -> int:
    differences = (i for i, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1)
    return next(differences, min(len(first), len(last)))


def _in_word(text: str, match: re.Match[str]) -> bool:
    start, end = match.span()
    around = (text[max(start - 1, 0) : start], text[end : end + 1])
    return any(re.match(r"\w", neighbour) for neighbour in around)


@dataclass(frozen=True)
class Vocabulary:
    """How every id is spelled; `special` maps the ids of special tokens to their text."""

    spelling: Spelling
    special: Mapping[int, str]
    without_special: Spelling = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Prepares the spelling in which special tokens have no text."""
        object.__setattr__(self, "without_special", self.spelling.without(self.special))

    def check(self, token_ids: Sequence[int]) -> None:
        """Raises `UnknownTokenIdError` for an id outside the vocabulary."""
        size = len(self.spelling.tokens)
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < size:
            raise UnknownTokenIdError(next(i for i in token_ids if not 0 <= i < size))


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids that a model's tokenizer puts around a whole text, such as BOS."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def around(self, token_ids: Sequence[int]) -> list[int]:
        """Gives the framed ids."""
        return [*self.prefix, *token_ids, *self.suffix]


@dataclass(frozen=True, slots=True)
class EncodingInfo:
    """Says what encodes (`tiktoken` or `tokenizers`) and why."""

    backend: str
    reason: str


class Encoding(Protocol):
    """Turns text into ids. Implementations may be called from several threads at once."""

    @property
    def info(self) -> EncodingInfo:
        """What encodes."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The byte table."""

    @property
    def control(self) -> AddedTokens:
        """Finds control tokens; for rendered templates only."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Encodes plain text. `continues` says that something stood before it in the input."""


def translated(text: str, table: Mapping[int, int]) -> str:
    """Replaces characters as `str.translate` does, in runs, so that other threads get a turn."""
    starts = range(0, len(text), _RUN)
    return "".join([text[start : start + _RUN].translate(table) for start in starts])


def encode_with_control(
    encoding: Encoding, text: str, restore: Mapping[int, int] | None = None
) -> list[int]:
    """Encodes a rendered template, in which a control token's text means the token.

    `restore` maps characters that stand for others (see `guard`) back, after the control tokens
    have been found: what they stand for can no longer become part of one.
    """
    token_ids: list[int] = []
    continues = False
    for part in encoding.control.split(text):
        if isinstance(part, int):
            token_ids.append(part)
        else:
            plain = translated(part, restore) if restore else part
            token_ids.extend(encoding.encode(plain, continues=continues))
        continues = True
    return token_ids
