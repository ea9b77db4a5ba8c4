"""Decides whether an answer is the right fact: all of its key terms, none of another's."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from guide_recipe.facts import Fact, HeldOutQuestion, fold


@dataclass(frozen=True)
class Verdict:
    """How one answer was judged, with the terms it lacks and the terms it should not hold."""

    fact: str
    question: str
    answer: str
    missing: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True when nothing is missing and nothing is foreign."""
        return not self.missing and not self.foreign


class Judge:
    """Knows every fact's key terms."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        self._terms = {fact.id: tuple(map(fold, fact.key_terms)) for fact in facts}

    def judge(self, item: HeldOutQuestion, answer: str) -> Verdict:
        """Compares `answer` with the terms of the question's fact; raises KeyError if unknown."""
        text = fold(answer)
        own = self._terms[item.fact]
        missing = tuple(term for term in own if term not in text)
        foreign = tuple(
            term
            for fact, terms in self._terms.items()
            for term in terms
            if fact != item.fact and term in text
        )
        return Verdict(item.fact, item.question, answer, missing, foreign)


def report(verdicts: list[Verdict]) -> dict[str, object]:
    """Sums verdicts up: the figure, and every failure in full."""
    passed = sum(verdict.passed for verdict in verdicts)
    return {
        "questions": len(verdicts),
        "passed": passed,
        "percent": round(100 * passed / max(1, len(verdicts)), 1),
        "failures": [asdict(verdict) for verdict in verdicts if not verdict.passed],
    }


def one_line(verdict: Verdict) -> str:
    """Returns a verdict as one line of a log."""
    answer = re.sub(r"\s+", " ", verdict.answer)
    return f"{'ok  ' if verdict.passed else 'FAIL'} {verdict.fact}: {verdict.question} -> {answer}"
