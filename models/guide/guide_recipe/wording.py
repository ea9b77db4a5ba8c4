"""The wording of a question: what is left of it once its subject is replaced by a slot.

Held-out questions must be worded unlike anything in training. Both sides are reduced to folded
words, the subject (with its article) becomes one slot, and no run of four words may be shared.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from guide_recipe.facts import Fact, HeldOutQuestion, fold, subject_key

SLOT = "<subject>"
GRAM_LENGTH = 4
Gram = tuple[str, ...]
_WORD = re.compile(r"<subject>|[^\W_]+(?:'[^\W_]+)?")


def words(text: str) -> list[str]:
    """Splits `text` into folded words; punctuation is dropped, the slot is kept whole."""
    return _WORD.findall(fold(text))


@lru_cache(maxsize=4096)
def _subject_pattern(about: tuple[str, ...], comparing: bool) -> re.Pattern[str] | None:
    names = {" ".join(words(subject_key(phrase))) for phrase in about}
    if comparing:
        halves = (half for phrase in about for half in phrase.split(" and "))
        names |= {" ".join(words(subject_key(half))) for half in halves}
    if not names - {""}:
        return None
    longest_first = sorted(names - {""}, key=len, reverse=True)
    alternatives = "|".join(map(re.escape, longest_first))
    return re.compile(rf"\b(?:(?:the|a|an|your|this|my) )?(?:{alternatives})\b")


def slotted(question: str, fact: Fact) -> list[str]:
    """Returns the words of `question` with every mention of the fact's subject as one slot."""
    text = " ".join(words(question))
    pattern = _subject_pattern(fact.about, fact.asks == "compare")
    return words(pattern.sub(SLOT, text)) if pattern else text.split()


def grams(question: str, fact: Fact) -> set[Gram]:
    """Returns every run of four words in the wording of `question`."""
    wording = slotted(question, fact)
    return {
        tuple(wording[start : start + GRAM_LENGTH])
        for start in range(len(wording) - GRAM_LENGTH + 1)
    }


def held_out_grams(held_out: Iterable[HeldOutQuestion], facts: Iterable[Fact]) -> frozenset[Gram]:
    """Returns the runs of words that training must refuse, over all held-out questions."""
    by_id = {fact.id: fact for fact in facts}
    return frozenset(gram for item in held_out for gram in grams(item.question, by_id[item.fact]))


def overlap(question: str, fact: Fact, refused: frozenset[Gram]) -> set[Gram]:
    """Returns the runs of words that `question` shares with the refused ones."""
    return grams(question, fact) & refused
