"""Whole training documents made from facts: dialogues of one or more turns, and plain text."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from guide_recipe.facts import NOUN_KINDS, Fact, HeldOutQuestion, subject_key
from guide_recipe.paraphrase import Paraphraser, scribble
from guide_recipe.phrasebook import Phrasebook, expand

# Facts about the model itself are few and asked often; what it does not know is endless.
SELF_SOURCE = "self"
SELF_WEIGHT = 2.0
OUT_OF_SCOPE = "self-out-of-scope"
OUT_OF_SCOPE_WEIGHT = 14.0
NUM_TURNS = ((1, 2, 3, 4, 6, 9, 14), (56, 20, 10, 7, 4, 2, 1))
PLAIN_TEXT_SHARE = 0.08


@dataclass(frozen=True)
class Segment:
    """A piece of a document: who says it (None: plain text) and whether the model learns it."""

    role: str | None
    text: str
    learned: bool


Document = list[Segment]


class DialogueWriter:
    """Draws documents; the same random generator state gives the same document."""

    def __init__(
        self, facts: Sequence[Fact], paraphraser: Paraphraser, phrasebook: Phrasebook
    ) -> None:
        self._facts = list(facts)
        self._weights = [_weight(fact) for fact in facts]
        self._paraphraser = paraphraser
        self._phrasebook = phrasebook
        self._siblings = siblings(facts)

    def write(self, rng: random.Random) -> Document:
        """Returns one document, most often a dialogue."""
        if rng.random() < PLAIN_TEXT_SHARE:
            return self._plain(rng)
        return self._dialogue(rng)

    def _dialogue(self, rng: random.Random) -> Document:
        document: Document = []
        if rng.random() < 0.2:
            system = expand(rng.choice(self._phrasebook.systems), rng)
            document.append(Segment("system", system, learned=False))
        fact: Fact | None = None
        for _ in range(rng.choices(*NUM_TURNS)[0]):
            fact, question = self._next_turn(fact, rng)
            document.append(Segment("user", question, learned=False))
            document.append(Segment("assistant", fact.answer, learned=True))
        return document

    def _next_turn(self, before: Fact | None, rng: random.Random) -> tuple[Fact, str]:
        related = self._siblings.get(before.id, []) if before else []
        if related and rng.random() < 0.4:
            fact = rng.choice(related)
            question = expand(rng.choice(self._phrasebook.follow_ups[fact.asks]), rng)
            if self._paraphraser.allows(question, fact):
                return fact, scribble(question, rng)
        fact = rng.choices(self._facts, self._weights)[0]
        return fact, self._paraphraser.ask(fact, rng)

    def _plain(self, rng: random.Random) -> Document:
        fact = rng.choice(self._facts)
        if rng.random() < 0.4:
            return [Segment(None, fact.answer, learned=True)]
        question = self._paraphraser.ask(fact, rng)
        if rng.random() < 0.5:
            return [
                Segment(None, f"Question: {question}", learned=False),
                Segment(None, f"\nAnswer: {fact.answer}", learned=True),
            ]
        return [Segment(None, question, learned=False), Segment(None, f"\n{fact.answer}", True)]


def asked(item: HeldOutQuestion, facts: dict[str, Fact]) -> Document:
    """Returns the conversation that asks `item`: its question, after the turn it follows, if any.

    That turn is the first hand-written question of the fact it was about, and its answer.
    """
    question = Segment("user", item.question, learned=False)
    if item.after is None:
        return [question]
    before = facts[item.after]
    opening = Segment("user", before.questions[0], learned=False)
    return [opening, Segment("assistant", before.answer, learned=True), question]


def siblings(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Maps a fact's id to the facts that answer another kind of question on the same subject."""
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.asks in NOUN_KINDS:
            for key in {subject_key(about) for about in fact.about}:
                groups[key].append(fact)
    related: dict[str, dict[str, Fact]] = defaultdict(dict)
    for group in groups.values():
        for fact in group:
            related[fact.id].update({other.id: other for other in group if other is not fact})
    return {
        identifier: [fact for fact in found.values()]
        for identifier, found in related.items()
        if found and len({fact.asks for fact in found.values()}) == len(found)
    }


def _weight(fact: Fact) -> float:
    if fact.id == OUT_OF_SCOPE:
        return OUT_OF_SCOPE_WEIGHT
    return SELF_WEIGHT if fact.source == SELF_SOURCE else 1.0
