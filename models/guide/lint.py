"""Lints the facts and the held-out questions: `python models/guide/lint.py` prints the problems."""

import sys
from pathlib import Path

from guide_recipe.facts import lint, load_facts, load_held_out
from guide_recipe.wording import GRAM_LENGTH, slotted

HERE = Path(__file__).parent


def main() -> int:
    """Prints every problem; returns the exit status, 1 if there is any."""
    facts = load_facts(HERE / "facts")
    problems = lint(facts)
    by_id = {fact.id: fact for fact in facts}
    for item in load_held_out(HERE / "held_out.jsonl"):
        if item.fact not in by_id:
            problems.append(f"held-out question for an unknown fact {item.fact}")
        elif len(slotted(item.question, by_id[item.fact])) < GRAM_LENGTH:
            problems.append(f"held-out question of fewer than {GRAM_LENGTH} words: {item.question}")
    print("\n".join([*problems, f"{len(facts)} facts, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
