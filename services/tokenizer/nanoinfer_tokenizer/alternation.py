"""Regular expressions that find one of many texts in linear time.

A plain alternation tries all texts at every place where one could start. With the 800 special
tokens of some models that takes more than a second, during which no other thread runs.
"""

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Final

# Groups are nested no deeper than this: the regular expressions' parser calls itself for each.
_MAX_DEPTH: Final = 32


def longest_of(texts: Iterable[str]) -> str:
    """Returns a pattern that matches the longest of `texts` at a place, or never if there is none.

    Empty texts are left out. Texts that begin alike share that beginning in the pattern.
    """
    return _alternatives({text for text in texts if text}, _MAX_DEPTH) or "(?!)"


def _alternatives(texts: set[str], depth: int) -> str:
    if not depth:
        return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return "|".join(
        _branch(list(group), depth) for _, group in groupby(sorted(texts), lambda text: text[0])
    )


def _branch(texts: list[str], depth: int) -> str:
    # In order: what the first and the last have in common, all have.
    first, last = texts[0], texts[-1]
    differ = (
        place for place, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1
    )
    prefix = first[: next(differ, len(first))]
    rests = {text[len(prefix) :] for text in texts} - {""}
    if not rests:
        return re.escape(prefix)
    # Greedy: the prefix alone is taken where nothing longer fits.
    is_text = "?" if prefix in texts else ""
    return f"{re.escape(prefix)}(?:{_alternatives(rests, depth - 1)}){is_text}"
