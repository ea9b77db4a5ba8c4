"""Keeps what users say from turning into special tokens.

Before a template sees a message, the character with which a special token would start is replaced
by a private-use character of equal length. The template renders it like any other; special tokens
are then looked for in the rendered text, where only the template's own can be found; only after
that are the characters put back and encoded as plain text.

A template may look into a message (`'</think>' in content`). So a character that is part of one of
the template's own literals is left alone, unless a special token could start there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# The private-use planes, then planes without a character: more than any text has characters.
_STAND_INS = range(0x10FFFF, 0x40000, -1)
_NEVER = r"(?!)"

_Finder = Callable[[str], Iterator[re.Match[str]]]


@dataclass(frozen=True, slots=True)
class Protected:
    """Texts that are safe to render, and the table that `str.translate` puts them back with."""

    texts: Sequence[str]
    restore: Mapping[int, int]


class ContentGuard:
    """Protects texts against a fixed set of special tokens."""

    def __init__(self, special_tokens: Iterable[str], literals: Iterable[str]) -> None:
        """Takes the special tokens' texts and the template's string literals."""
        tokens = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        # A letter or a space that a template might trim or change the case of is replaced only
        # where the whole token follows.
        starts = {token[0] for token in tokens if _is_sign(token[0])}
        self._keys = sorted(starts | {_key(token)[1] for token in tokens})
        self._whole = _everywhere(tokens)
        self._kept = list(_kept_places(starts, tokens, literals))
        self._start = re.compile("|".join(map(re.escape, starts)) or _NEVER)
        self._suspect = re.compile("|".join(map(re.escape, [*starts, *tokens])) or _NEVER)

    def protect(self, texts: Sequence[str]) -> Protected:
        """Replaces what could start a special token in any of `texts`."""
        suspects = [bool(self._suspect.search(text)) for text in texts]
        if not any(suspects):
            return Protected(texts, {})
        taken = {ord(character) for text in texts for character in set(text)}
        free = (code for code in _STAND_INS if code not in taken)
        stand_ins = {key: chr(next(free)) for key in self._keys}
        safe = [
            self._replace(text, stand_ins) if suspect else text
            for text, suspect in zip(texts, suspects, strict=True)
        ]
        return Protected(safe, {ord(stand_in): ord(key) for key, stand_in in stand_ins.items()})

    def _replace(self, text: str, stand_ins: Mapping[str, str]) -> str:
        starts = {match.start() for match in self._start.finditer(text)}
        keep = {match.start() + place for literal, place in self._kept for match in literal(text)}
        whole = {match.start() + _key(match[1])[0] for match in self._whole(text)}
        characters = list(text)
        for place in (starts - keep) | whole:
            characters[place] = stand_ins[characters[place]]
        return "".join(characters)


def _kept_places(
    starts: set[str], tokens: Sequence[str], literals: Iterable[str]
) -> Iterator[tuple[_Finder, int]]:
    """Finds where in a literal a token's first character cannot start a token."""
    for literal in set(literals):
        for place, character in enumerate(literal):
            rest = literal[place:]
            harmless = not any(rest.startswith(token) or token.startswith(rest) for token in tokens)
            if character in starts and harmless:
                yield _everywhere([literal]), place


def _everywhere(texts: Sequence[str]) -> _Finder:
    """Finds every place where one of `texts` stands, overlapping ones too."""
    return re.compile(f"(?=({'|'.join(map(re.escape, texts)) or _NEVER}))").finditer


def _is_sign(character: str) -> bool:
    """Tells whether a template's filters (trim, upper, tojson) leave the character as it is."""
    return not character.isalnum() and not character.isspace() and character not in "\"'\\&"


def _key(token: str) -> tuple[int, str]:
    """Chooses the character of a token that is replaced, and its place: the first but spaces."""
    place = len(token) - len(token.lstrip())
    return (place, token[place]) if place < len(token) else (0, token[0])
