"""Wordings as data: text files of templates in which `[a|b]` chooses one alternative."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_PREPOSITION = re.compile(r" (?:of|in|for|on|with|to|from|by|at|between|per|over|as|under) ")


def expand(template: str, rng: random.Random) -> str:
    """Resolves every choice of `template`, innermost first, and joins double spaces."""
    while _CHOICE.search(template):
        template = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return re.sub(r" +", " ", template).replace(" ,", ",").replace(" ?", "?").strip()


def is_plural(phrase: str) -> bool:
    """Guesses whether a noun phrase is plural, from the last word before any preposition."""
    if phrase.lower().startswith(("a ", "an ")):
        return False
    head = _PREPOSITION.split(phrase)[0].split()[-1].lower()
    return head.endswith("s") and not head.endswith(("ss", "us", "is"))


def fill(template: str, subject: str, halves: tuple[str, str] | None = None) -> str:
    """Puts a subject into a resolved template; `halves` fills the {a} and {b} of a comparison."""
    plural = is_plural(halves[0] if halves else subject)
    text = template.replace("{x}", subject)
    text = text.replace("{is}", "are" if plural else "is")
    text = text.replace("{does}", "do" if plural else "does")
    text = text.replace("{it}", "they" if plural else "it")
    if halves:
        text = text.replace("{a}", halves[0]).replace("{b}", halves[1])
    return text


@dataclass(frozen=True)
class Phrasebook:
    """All templates: by kind of question, around a question, after a turn, and system prompts."""

    kinds: dict[str, tuple[str, ...]]
    prefixes: tuple[str, ...]
    suffixes: tuple[str, ...]
    contexts: tuple[str, ...]
    follow_ups: dict[str, tuple[str, ...]]
    systems: tuple[str, ...]
    asides: tuple[str, ...]


def load_phrasebook(folder: Path, asides: tuple[str, ...]) -> Phrasebook:
    """Reads the wordings, in which # starts a comment; asides are sentences about other things."""
    follow_ups: dict[str, list[str]] = {}
    for line in _lines(folder / "follow_ups.txt"):
        kind, template = line.split(" ", 1)
        follow_ups.setdefault(kind, []).append(template)
    return Phrasebook(
        {k: _lines(folder / f"{k}.txt") for k in ("what", "why", "how", "effect", "compare")},
        _lines(folder / "prefix.txt"),
        _lines(folder / "suffix.txt"),
        _lines(folder / "context.txt"),
        {kind: tuple(templates) for kind, templates in follow_ups.items()},
        _lines(folder / "system.txt"),
        asides,
    )


def _lines(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
