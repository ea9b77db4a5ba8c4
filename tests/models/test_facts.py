"""The facts agree with their schema and with one another, and the lint would say if not."""

from dataclasses import replace
from pathlib import Path

import pytest
from guide_recipe.facts import Fact, lint, load_facts

GOOD = Fact(
    "a",
    "what",
    ("a widget",),
    ("q1", "q2", "q3", "q4", "q5"),
    "A widget turns.",
    ("widget turns",),
    "x",
)


def test_shipped_facts_are_clean(guide: Path) -> None:
    facts = load_facts(guide / "facts")
    assert lint(facts) == []
    assert len(facts) >= 300
    assert {"nanoinfer", "inference", "systems", "self"} == {fact.source for fact in facts}


def test_every_fact_is_asked_in_several_ways(guide: Path) -> None:
    assert all(len(set(fact.questions)) >= 5 for fact in load_facts(guide / "facts"))


def test_a_clean_fact_has_no_problem() -> None:
    assert lint([GOOD]) == []


OTHER = replace(
    GOOD, id="b", about=("a gadget",), questions=("1", "2", "3", "4", "5"), answer="Gadgets stop."
)


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ([GOOD, replace(OTHER, id="a", key_terms=("gadgets",))], "id used"),
        ([replace(GOOD, key_terms=("gadget",))], "not in its answer"),
        (
            [GOOD, replace(OTHER, answer="No WIDGET turns.", key_terms=("no",))],
            "also in the answer",
        ),
        ([GOOD, replace(OTHER, about=("the Widget",), key_terms=("stop",))], "asks for"),
        ([GOOD, replace(OTHER, questions=GOOD.questions, key_terms=("stop",))], "belongs to"),
        ([replace(GOOD, questions=("q1", "Q1", "q2", "q3", "q4"))], "fewer than 5"),
        ([replace(GOOD, asks="other")], "fewer than 8"),
        ([replace(GOOD, asks="compare")], "not 'A and B'"),
        ([replace(GOOD, asks="whence")], "is none of"),
        ([replace(GOOD, about=())], "no subject"),
    ],
)
def test_lint_names_each_problem(facts: list[Fact], problem: str) -> None:
    assert any(problem in found for found in lint(facts))


def test_a_line_that_is_no_fact_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "colour": "red"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        load_facts(tmp_path)
