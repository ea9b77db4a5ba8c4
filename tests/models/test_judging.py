"""The judge passes the right answer, the whole of it, and nothing besides."""

from pathlib import Path

from guide_recipe.facts import Fact, HeldOutQuestion, fold, lint, load_facts, load_held_out
from guide_recipe.judging import Judge

FACTS = [
    Fact("a", "what", ("x",), (), "Alpha beta.", ("alpha", "beta"), "f"),
    Fact("b", "what", ("y",), (), "Gamma.", ("gamma",), "f"),
]
ASKED = HeldOutQuestion("a", "What is x?")


def test_gold_answers_pass(guide: Path) -> None:
    facts = load_facts(guide / "facts")
    judge = Judge(facts)
    verdicts = [judge.judge(HeldOutQuestion(f.id, f.questions[0]), f.answer) for f in facts]
    assert [verdict for verdict in verdicts if not verdict.passed] == []


def test_no_key_term_occurs_in_two_answers(guide: Path) -> None:
    facts = load_facts(guide / "facts")
    assert len(facts) >= 300
    assert lint(facts) == []


def test_another_facts_answer_never_passes(guide: Path) -> None:
    facts = load_facts(guide / "facts")
    judge = Judge(facts)
    for fact, other in zip(facts, [*facts[1:], facts[0]], strict=True):
        assert not judge.judge(HeldOutQuestion(fact.id, ""), other.answer).passed


def test_a_missing_term_fails() -> None:
    verdict = Judge(FACTS).judge(ASKED, "Only ALPHA here.")
    assert verdict.missing == ("beta",)
    assert not verdict.passed


def test_a_foreign_term_fails() -> None:
    verdict = Judge(FACTS).judge(ASKED, "alpha\n BETA and Gamma")
    assert verdict.missing == ()
    assert verdict.foreign == ("gamma",)
    assert not verdict.passed


def test_everyday_questions_are_in_no_other_file(guide: Path) -> None:
    facts = load_facts(guide / "facts")
    items = load_held_out(guide / "dev_questions.jsonl")
    known = {fact.id for fact in facts}
    assert all(item.fact in known and (item.after or item.fact) in known for item in items)
    written = {fold(question) for fact in facts for question in fact.questions}
    written |= {fold(item.question) for item in load_held_out(guide / "held_out.jsonl")}
    assert not written & {fold(item.question) for item in items}
    assert len({(item.question, item.after) for item in items}) == len(items) == 70
