"""The questions that judge the shipped model are worded unlike anything that it was trained on."""

import random
from collections import Counter
from pathlib import Path

import pytest
from guide_recipe.factory import Sources, load_sources
from guide_recipe.facts import Fact, fold
from guide_recipe.wording import GRAM_LENGTH, held_out_grams, overlap, slotted


@pytest.fixture(scope="module")
def sources(guide: Path) -> Sources:
    return load_sources(guide)


@pytest.fixture(scope="module")
def by_id(sources: Sources) -> dict[str, Fact]:
    return {fact.id: fact for fact in sources.facts}


def test_sixty_questions_spread_over_the_files(sources: Sources, by_id: dict[str, Fact]) -> None:
    assert len({item.fact for item in sources.held_out}) == 60
    spread = Counter(by_id[item.fact].source for item in sources.held_out)
    assert spread == {"nanoinfer": 20, "inference": 20, "systems": 20}


def test_nothing_hand_written_shares_a_wording(sources: Sources, by_id: dict[str, Fact]) -> None:
    for item in sources.held_out:  # long enough to compare
        assert len(slotted(item.question, by_id[item.fact])) >= GRAM_LENGTH + 1
    refused = held_out_grams(sources.held_out, sources.facts)
    asked = [(q, fact) for fact in sources.facts for q in fact.questions]
    asked += [(item.question, by_id[item.fact]) for item in sources.validation]
    assert [q for q, fact in asked if overlap(q, fact, refused)] == []


def test_nothing_drawn_shares_a_wording(sources: Sources) -> None:
    refused = held_out_grams(sources.held_out, sources.facts)
    never = {fold(item.question) for item in sources.held_out}
    rng = random.Random(7)
    for place in range(2000):
        fact = sources.facts[place % len(sources.facts)]
        question = sources.paraphraser.ask(fact, rng)
        assert not overlap(question, fact, refused), question
        assert fold(question) not in never
