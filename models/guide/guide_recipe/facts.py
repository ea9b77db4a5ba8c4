"""What the guide model knows: facts in JSON lines, the held-out questions, and their lint.

A fact is one answer with the many questions that ask for it. `about` names the subject in the
form that the wordings of its kind (`asks`) expect: noun phrases for what, why and how, a clause
for effect, "A and B" for compare, anything for other, which has no wordings.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

KINDS = ("what", "why", "how", "effect", "compare", "other")
NOUN_KINDS = ("what", "why", "how")
MIN_QUESTIONS = {kind: 8 if kind == "other" else 5 for kind in KINDS}
MAX_ANSWER_CHARACTERS = 600


@dataclass(frozen=True)
class Fact:
    """One thing the model can say, and how it is asked for."""

    id: str
    asks: str
    about: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    key_terms: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question to judge answers by, in no fact's own list, and the fact that answers it.

    `after` names the fact that the turn before was about; without it, no turn came before.
    """

    fact: str
    question: str
    after: str | None = None


def fold(text: str) -> str:
    """Lower-cases `text`, straightens quotes and joins white space, the form terms match in."""
    straight = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u2011", "-")
    return re.sub(r"\s+", " ", straight).strip().lower()


def subject_key(about: str) -> str:
    """Folds a subject and drops its article, so that "the KV cache" and "a KV cache" are one."""
    return re.sub(r"^(?:the|a|an) ", "", fold(about))


def load_facts(folder: Path) -> list[Fact]:
    """Reads every `*.jsonl` of `folder`; raises ValueError naming the line that is no fact."""
    facts = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                facts.append(_fact(json.loads(line), path.stem))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.name}:{number}: {error!r}") from error
    return facts


def _fact(row: dict[str, object], source: str) -> Fact:
    extra = set(row) - {"id", "asks", "about", "questions", "answer", "key_terms"}
    if extra:
        raise ValueError(f"unknown fields {sorted(extra)}")
    lists = {name: row[name] for name in ("about", "questions", "key_terms")}
    for name, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} is not a list of strings")
    about, questions, key_terms = (tuple(map(str, value)) for value in lists.values())  # type: ignore[call-overload]
    return Fact(
        str(row["id"]), str(row["asks"]), about, questions, str(row["answer"]), key_terms, source
    )


def load_held_out(path: Path) -> list[HeldOutQuestion]:
    """Reads questions to judge by: `{"fact": id, "question": text}` lines, some with `after`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [HeldOutQuestion(**json.loads(line)) for line in lines if line.strip()]


def lint(facts: list[Fact]) -> list[str]:
    """Names every way in which the facts contradict the schema or one another; empty when clean."""
    return [
        *_duplicates(facts),
        *(problem for fact in facts for problem in _shape_problems(fact)),
        *_foreign_terms(facts),
        *_ambiguous_subjects(facts),
        *_ambiguous_questions(facts),
    ]


def _duplicates(facts: list[Fact]) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for fact in facts:
        if fact.id in seen:
            problems.append(f"{fact.id}: id used in {seen[fact.id]} and {fact.source}")
        seen[fact.id] = fact.source
    return problems


def _shape_problems(fact: Fact) -> list[str]:
    if fact.asks not in KINDS:
        return [f"{fact.id}: asks {fact.asks!r} is none of {KINDS}"]
    problems = []
    if len(set(map(fold, fact.questions))) < MIN_QUESTIONS[fact.asks]:
        problems.append(f"{fact.id}: fewer than {MIN_QUESTIONS[fact.asks]} different questions")
    if fact.asks != "other" and not fact.about:
        problems.append(f"{fact.id}: no subject")
    if fact.asks == "compare":
        problems += [f"{fact.id}: {x!r} is not 'A and B'" for x in fact.about if " and " not in x]
    if not 1 <= len(fact.key_terms) <= 3:
        problems.append(f"{fact.id}: {len(fact.key_terms)} key terms")
    if len(fact.answer) > MAX_ANSWER_CHARACTERS:
        problems.append(f"{fact.id}: the answer has {len(fact.answer)} characters")
    answer = fold(fact.answer)
    problems += [
        f"{fact.id}: key term {term!r} is not in its answer"
        for term in fact.key_terms
        if fold(term) not in answer
    ]
    return problems


def _foreign_terms(facts: list[Fact]) -> list[str]:
    answers = [(fact.id, fold(fact.answer)) for fact in facts]
    return [
        f"{fact.id}: key term {term!r} is also in the answer of {other}"
        for fact in facts
        for term in fact.key_terms
        for other, answer in answers
        if other != fact.id and fold(term) in answer
    ]


def _ambiguous_subjects(facts: list[Fact]) -> list[str]:
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        if fact.asks != "other":
            for about in fact.about:
                owners[fact.asks, subject_key(about)].add(fact.id)
    return [
        f"{asks} {subject!r} asks for {sorted(ids)}"
        for (asks, subject), ids in owners.items()
        if len(ids) > 1
    ]


def _ambiguous_questions(facts: list[Fact]) -> list[str]:
    owners: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        for question in fact.questions:
            owners[fold(question)].add(fact.id)
    return [
        f"question {question!r} belongs to {sorted(ids)}"
        for question, ids in owners.items()
        if len(ids) > 1
    ]
