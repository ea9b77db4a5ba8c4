"""Asks a fact in ever new words, and never in the words of a held-out question."""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from guide_recipe.facts import NOUN_KINDS, Fact, subject_key
from guide_recipe.phrasebook import Phrasebook, expand, fill
from guide_recipe.wording import Gram, overlap, words

MAX_TRIES = 200
# Words that a hurried writer leaves out without changing what is asked.
_DROPPABLE = frozenset(
    re.findall(
        r"\S+",
        "the a an is are does do of to me you it that this please can could would in for by with "
        "at and so we i i'm exactly really actually there one some any just",
    )
)
_FIRST_PERSON = re.compile(r"I\b|I'")


class Paraphraser:
    """Draws questions for facts; deterministic given the random generator that is passed in."""

    def __init__(
        self, facts: Sequence[Fact], phrasebook: Phrasebook, refused: frozenset[Gram]
    ) -> None:
        self._phrasebook = phrasebook
        self._refused = refused
        self._stand_ins = stand_ins(facts)

    def ask(self, fact: Fact, rng: random.Random) -> str:
        """Returns a question for `fact`; raises ValueError if all its wordings are refused."""
        for _ in range(MAX_TRIES):
            question = self._decorate(self._core(fact, rng), rng)
            noisy = scribble(question, rng)
            if not overlap(question, fact, self._refused) and self.allows(noisy, fact):
                return noisy
        raise ValueError(f"{fact.id}: every wording tried is held out")

    def allows(self, question: str, fact: Fact) -> bool:
        """Says whether training may use `question`: something is left, and nothing held out."""
        return bool(words(question)) and not overlap(question, fact, self._refused)

    def _core(self, fact: Fact, rng: random.Random) -> str:
        if fact.asks == "other" or rng.random() < 0.35:
            return rng.choice(fact.questions)
        kind, subject = fact.asks, rng.choice(fact.about)
        others = self._stand_ins.get(fact.id)
        if others and rng.random() < 0.2:
            kind, subject = rng.choice(others)
        template = expand(rng.choice(self._phrasebook.kinds[kind]), rng)
        if rng.random() < 0.08:
            template = self._scatter("{a} and {b}" if kind == "compare" else "{x}", rng)
        if kind == "effect":
            return _capitalised(fill(template, subject))
        if kind == "compare":
            halves = [vary_article(half, rng) for half in subject.split(" and ", 1)]
            rng.shuffle(halves)
            return _capitalised(fill(template, subject, (halves[0], halves[1])))
        return _capitalised(fill(template, vary_article(subject, rng)))

    def _scatter(self, slots: str, rng: random.Random) -> str:
        """Makes a template of words about other things: the subject alone has to be enough."""
        pieces = [" ".join(_some_words(rng.choice(self._phrasebook.asides), rng)) for _ in "123"]
        inner = f" {pieces[2]} " if rng.random() < 0.5 else " and "
        text = slots.replace(" and ", inner)
        return f"{pieces[0]} {text} {pieces[1]}".strip() + rng.choice(["", "?", "?", "."])

    def _decorate(self, question: str, rng: random.Random) -> str:
        book = self._phrasebook
        if rng.random() < 0.12:
            context = rng.choice(book.contexts)
            if rng.random() < 0.5 and question[-1] in "?.":
                question = f"{question[:-1]}{rng.choice([' ', ', '])}{context}{question[-1]}"
            else:
                question = f"{_capitalised(context)}, {_lowered(question)}"
        if rng.random() < 0.10:
            question = _with_aside(question, rng.choice(book.asides), rng)
        for _ in range(rng.choices((0, 1, 2), (62, 33, 5))[0]):
            prefix = expand(rng.choice(book.prefixes), rng)
            joined = _lowered(question) if prefix.endswith((",", "but")) else question
            question = f"{prefix} {joined}"
        if rng.random() < 0.15:
            question = f"{question} {expand(rng.choice(book.suffixes), rng)}"
        return question


def stand_ins(facts: Sequence[Fact]) -> dict[str, list[tuple[str, str]]]:
    """Maps a fact's id to the (kind, subject) pairs it also answers, since no other fact does.

    A subject with a "what" but no "why" gets its "what" for both; a wrong kind of question about
    a known thing is then still met with what is known of it.
    """
    owners: dict[str, dict[str, tuple[Fact, str]]] = defaultdict(dict)
    for fact in facts:
        if fact.asks in NOUN_KINDS:
            for about in fact.about:
                owners[subject_key(about)][fact.asks] = (fact, about)
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for by_kind in owners.values():
        fact, about = next(by_kind[kind] for kind in NOUN_KINDS if kind in by_kind)
        found[fact.id] += [(kind, about) for kind in NOUN_KINDS if kind not in by_kind]
    return found


def vary_article(subject: str, rng: random.Random) -> str:
    """Sometimes changes or drops the article of a noun phrase, as people do."""
    bare = re.sub(r"^(?:the|a|an) ", "", subject)
    if bare == subject:
        return subject
    article = rng.choices((None, "", "the ", "your ", "this "), (78, 12, 6, 2, 2))[0]
    return subject if article is None else article + bare


def scribble(question: str, rng: random.Random) -> str:
    """Adds what hurried fingers add: lost words, typing slips, odd case, missing punctuation."""
    edits: tuple[tuple[float, Callable[[str, random.Random], str]], ...] = (
        (0.10, _drop_word),
        (0.03, _swap_words),
        (0.12, _slip),
        (0.25, _no_punctuation),
        (0.20, lambda text, _: text.lower()),
        (0.01, lambda text, _: text.upper()),
        (0.04, lambda text, _: text.replace("-", " ")),
        (0.03, lambda text, _: text.replace("?", "??").replace("!", "!!")),
    )
    for probability, edit in edits:
        if rng.random() < probability:
            question = edit(question, rng)
    return question.strip()


def _drop_word(text: str, rng: random.Random) -> str:
    parts = text.split(" ")
    places = [i for i, part in enumerate(parts) if part.lower() in _DROPPABLE]
    for place in sorted(rng.sample(places, min(len(places), rng.randint(1, 2))), reverse=True):
        del parts[place]
    return " ".join(parts) if parts else text


def _swap_words(text: str, rng: random.Random) -> str:
    parts = text.split(" ")
    if len(parts) < 4:
        return text
    place = rng.randrange(len(parts) - 1)
    parts[place], parts[place + 1] = parts[place + 1], parts[place]
    return " ".join(parts)


def _slip(text: str, rng: random.Random) -> str:
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    place = rng.choice(places)
    before, here, after, rest = text[:place], text[place], text[place + 1], text[place + 2 :]
    slips = (after + here, after, here + here + after, chr(rng.randint(97, 122)) + after)
    return before + rng.choice(slips) + rest


def _no_punctuation(text: str, _: random.Random) -> str:
    return text.rstrip("?.!")


def _some_words(sentence: str, rng: random.Random) -> list[str]:
    parts = sentence.rstrip(".").split(" ")
    start = rng.randrange(len(parts))
    return parts[start : start + rng.randint(0, 5)]


def _with_aside(question: str, aside: str, rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return f"{question} {aside}"
    if kind < 0.6:
        return f"{aside} {question}"
    link = rng.choice([", so ", ", ", " and ", ", but ", "; ", ": ", " - "])
    return f"{aside.rstrip('.')}{link}{_lowered(question)}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lowered(text: str) -> str:
    first = text.split(" ", 1)[0]
    if _FIRST_PERSON.match(text) or any(letter.isupper() for letter in first[1:]):
        return text
    return text[:1].lower() + text[1:]
