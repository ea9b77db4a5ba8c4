"""Keeps what users say from turning into control tokens.

Before a template sees a message, every character with which a control token could start is replaced
by a private-use character, a stand-in. The template renders it like any other; control tokens are
then looked for in the rendered text, where only the template's own can be found; only after that
are the characters put back and encoded as plain text.

A template may look into a message (`'</think>' in content`). The process that renders it looks
through the stand-ins (see `template_worker`), so it sees what was written.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nanoinfer_tokenizer.encodings import longest_of

# The private-use planes, then planes without a character: more than any text has characters.
_STAND_INS = range(0x10FFFF, 0x40000, -1)


@dataclass(frozen=True, slots=True)
class Protected:
    """Texts that are safe to render, and what each stand-in in them stands for."""

    texts: Sequence[str]
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    @property
    def restore(self) -> Mapping[int, int]:
        """The table with which `str.translate` puts the characters back."""
        return {ord(stand_in): ord(key) for stand_in, key in self.stand_ins.items()}


class ContentGuard:
    """Protects texts against a fixed set of control tokens, in time that grows with the texts."""

    def __init__(self, control_tokens: Iterable[str], template: str) -> None:
        """Takes the control tokens' texts and the template's source, whose characters stay free."""
        tokens = {token for token in control_tokens if token}
        self._signs = sorted({_key(token)[1] for token in tokens if _is_sign(_key(token)[1])})
        # A letter or a space that a template might trim or change the case of is replaced only
        # where the whole token follows; a look-ahead finds tokens that overlap, too.
        words = {token for token in tokens if not _is_sign(_key(token)[1])}
        self._places = {token: _key(token)[0] for token in words}
        self._keys = sorted({_key(token)[1] for token in words} | set(self._signs))
        self._words = re.compile(f"(?=({longest_of(words)}))")
        self._reserved = frozenset(template)

    def protect(self, texts: Sequence[str]) -> Protected:
        """Replaces what could start a control token in any of `texts`."""
        if not any(map(self._is_suspect, texts)):
            return Protected(texts)
        taken = self._reserved.union(*texts)
        free = (chr(code) for code in _STAND_INS if chr(code) not in taken)
        stand_in_of = {key: next(free) for key in self._keys}
        safe = [self._replace(text, stand_in_of) for text in texts]
        return Protected(safe, {stand_in: key for key, stand_in in stand_in_of.items()})

    def _is_suspect(self, text: str) -> bool:
        if any(sign in text for sign in self._signs):
            return True
        return bool(self._places) and self._words.search(text) is not None

    def _replace(self, text: str, stand_in_of: Mapping[str, str]) -> str:
        if self._places:
            characters = list(text)
            for match in self._words.finditer(text):
                place = match.start() + self._places[match[1]]
                characters[place] = stand_in_of[text[place]]
            text = "".join(characters)
        for sign in self._signs:
            text = text.replace(sign, stand_in_of[sign])
        return text


def _is_sign(character: str) -> bool:
    """Tells whether a template's filters (trim, upper, tojson) leave the character as it is."""
    return not character.isalnum() and not character.isspace() and character not in "\"'\\&"


def _key(token: str) -> tuple[int, str]:
    """Chooses the character of a token that is replaced, and its place: the first but spaces."""
    place = len(token) - len(token.lstrip())
    return (place, token[place]) if place < len(token) else (0, token[0])
