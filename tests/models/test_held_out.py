"""Held-out questions are worded unlike anything that training can draw."""

import random
from collections import Counter
from pathlib import Path

import pytest
from guide_recipe.factory import Sources, load_sources
from guide_recipe.facts import Fact, fold
from guide_recipe.paraphrase import Paraphraser
from guide_recipe.phrasebook import expand, fill, load_phrasebook
from guide_recipe.wording import GRAM_LENGTH, grams, held_out_grams, overlap, slotted

NUM_DRAWN = 6000


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


def test_each_has_a_wording_to_compare(sources: Sources, by_id: dict[str, Fact]) -> None:
    for item in sources.held_out:
        assert len(slotted(item.question, by_id[item.fact])) >= GRAM_LENGTH + 1


def test_nothing_hand_written_shares_a_wording(sources: Sources, by_id: dict[str, Fact]) -> None:
    refused = held_out_grams(sources.held_out, sources.facts)
    asked = [(q, fact) for fact in sources.facts for q in fact.questions]
    asked += [(item.question, by_id[item.fact]) for item in sources.validation]
    assert [q for q, fact in asked if overlap(q, fact, refused)] == []


def test_nothing_drawn_shares_a_wording(sources: Sources) -> None:
    refused = held_out_grams(sources.held_out, sources.facts)
    never = {fold(item.question) for item in sources.held_out}
    rng = random.Random(7)
    for place in range(NUM_DRAWN):
        fact = sources.facts[place % len(sources.facts)]
        question = sources.paraphraser.ask(fact, rng)
        assert not overlap(question, fact, refused), question
        assert fold(question) not in never


def test_no_dialogue_holds_a_held_out_question(sources: Sources) -> None:
    never = {fold(item.question) for item in sources.held_out}
    rng = random.Random(8)
    drawn = [segment for _ in range(2000) for segment in sources.writer.write(rng)]
    assert len(drawn) > 4000
    assert not never & {fold(segment.text) for segment in drawn}


def test_the_subject_and_its_article_become_one_slot(by_id: dict[str, Fact]) -> None:
    cache = by_id["inf-kv-cache"]
    assert slotted("Is the KV-cache, or a KV cache, small?", cache) == [
        "is", "<subject>", "or", "<subject>", "small",
    ]  # fmt: skip
    shared = grams("How big is the KV cache today?", cache)
    assert shared == grams("how big is a key value cache TODAY", cache)


def test_generator_refuses_a_wording(guide: Path, by_id: dict[str, Fact]) -> None:
    fact = by_id["inf-kv-cache"]
    book = load_phrasebook(guide / "wordings", ("Nothing to see here today.",))
    refused = frozenset({("what", "is", "meant", "by")})
    rng = random.Random(3)
    drawn = [Paraphraser([fact], book, refused).ask(fact, rng) for _ in range(3000)]
    free = [Paraphraser([fact], book, frozenset()).ask(fact, rng) for _ in range(3000)]
    assert not any(overlap(question, fact, refused) for question in drawn)
    assert any(overlap(question, fact, refused) for question in free)


def test_a_fact_without_any_allowed_wording_is_an_error(
    guide: Path, by_id: dict[str, Fact]
) -> None:
    fact = by_id["ni-scale-gateway"]
    book = load_phrasebook(guide / "wordings", ("Nothing to see here today.",))
    everything = frozenset(gram for question in fact.questions for gram in grams(question, fact))
    with pytest.raises(ValueError, match="every wording"):
        Paraphraser([fact], book, everything).ask(fact, random.Random(0))


def test_there_are_many_wordings_of_each_kind(guide: Path) -> None:
    book = load_phrasebook(guide / "wordings", ())
    for kind, templates in book.kinds.items():
        assert len(set(templates)) >= 40, kind


def test_wordings_follow_the_number_of_the_subject() -> None:
    rng = random.Random(0)
    assert fill(expand("What {is} {x}?", rng), "CUDA graphs") == "What are CUDA graphs?"
    assert (
        fill(expand("What {is} {x}?", rng), "the size of blocks") == "What is the size of blocks?"
    )
    both = fill("How {does} {a} differ from {b}?", "", ("a token", "words"))
    assert both == "How does a token differ from words?"
