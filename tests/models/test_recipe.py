"""The recipe's moving parts: batches, schedule, network, training loop."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from guide_recipe.corpus import Example, batches, encode_document, encode_library, library_sources
from guide_recipe.dialogues import Segment
from guide_recipe.factory import load_sources, split_validation
from guide_recipe.facts import load_facts
from guide_recipe.llama import Llama, LlamaShape, complete_greedily
from guide_recipe.tokenizer import (
    END,
    PAD,
    VOCABULARY_SIZE,
    merges_rise,
    special_id,
    train_tokenizer,
)
from guide_recipe.training import Recipe, optimise, rate_at
from tokenizers import Tokenizer
from tokenizers.models import BPE

TINY = LlamaShape(
    hidden=64, num_layers=1, num_heads=1, num_kv_heads=1, intermediate=128, max_positions=256
)


@pytest.fixture(scope="module")
def tokenizer(guide: Path) -> Tokenizer:
    return Tokenizer.from_file(str(guide / "tokenizer.json"))


def test_batches_hold_every_example_once_and_pad_the_rest() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(2, 60) for _ in range(300)]
    examples = [
        Example(np.full(n, i + 1, dtype=np.uint16), np.ones(n, dtype=np.bool_))
        for i, n in enumerate(lengths)
    ]
    seen: list[int] = []
    for batch in batches(examples, 512, pad=999, rng=rng):
        assert batch.ids.shape == batch.learned.shape
        assert batch.ids.shape[0] * (batch.ids.shape[1] - 8) <= 512
        for ids, learned in zip(batch.ids, batch.learned, strict=True):
            number = int(ids[0])
            seen.append(number)
            assert learned.sum() == lengths[number - 1]
            assert set(ids[learned].tolist()) == {number}
            assert set(ids[~learned].tolist()) <= {999}
    assert sorted(seen) == list(range(1, 301))


def test_turns_that_do_not_fit_are_left_out(tokenizer: Tokenizer) -> None:
    turn = [Segment("user", "one two three", False), Segment("assistant", "four five", True)]
    whole = encode_document(turn * 3, tokenizer, random.Random(0))
    cut = encode_document(turn * 3, tokenizer, random.Random(0), max_tokens=len(whole.ids) - 1)
    assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
    assert len(cut.ids) < len(whole.ids)


def test_library_code_is_bounded_and_complete(tokenizer: Tokenizer) -> None:
    sources = library_sources()
    assert 500_000 < sum(map(len, sources)) <= 3 * 1024 * 1024
    windows = encode_library(["x = 1\n"], tokenizer, random.Random(0))
    text = tokenizer.decode([int(i) for window in windows for i in window.ids])
    assert text == "x = 1\n"


def test_validation_questions_leave_training(guide: Path) -> None:
    trained, validation = split_validation(load_facts(guide / "facts"))
    by_id = {fact.id: fact for fact in trained}
    assert len(validation) >= 100
    assert not any(item.question in by_id[item.fact].questions for item in validation)


def test_documents_depend_on_the_seed_alone(guide: Path) -> None:
    first, second = load_sources(guide).writer, load_sources(guide).writer
    one, two = random.Random(5), random.Random(5)
    assert [first.write(one) for _ in range(50)] == [second.write(two) for _ in range(50)]


def test_two_ways_to_one_token_are_noticed() -> None:
    # tiktoken knows tokens, not the pairs that make them.
    vocabulary = {token: number for number, token in enumerate(("a", "b", "c", "ab", "bc", "abc"))}
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    assert merges_rise(Tokenizer(BPE(vocabulary, merges)))
    assert not merges_rise(Tokenizer(BPE(vocabulary, [*merges, ("a", "bc")])))


def test_a_vocabulary_is_trained_to_size() -> None:
    trained = train_tokenizer(library_sources()[:60])
    assert trained.get_vocab_size() == VOCABULARY_SIZE
    assert trained.decode(trained.encode("naïve 世界").ids) == "naïve 世界"


def test_rate_warms_up_and_anneals() -> None:
    recipe = Recipe(peak_rate=1.0, warmup_steps=10)
    assert rate_at(0, 0.0, recipe) == pytest.approx(0.1)
    assert rate_at(10, 0.0, recipe) == pytest.approx(1.0)
    assert rate_at(10, 0.5, recipe) == pytest.approx(0.505)
    assert rate_at(10, 1.0, recipe) == pytest.approx(0.01)


def test_a_small_network_learns_answers_by_heart(tokenizer: Tokenizer) -> None:
    pairs = [("What is one?", "The first of all."), ("What is two?", "Twice as many.")]
    rng = random.Random(0)
    examples = [
        encode_document([Segment("user", q, False), Segment("assistant", a, True)], tokenizer, rng)
        for q, a in pairs
    ]
    torch.manual_seed(0)
    network = Llama(TINY)
    recipe = Recipe(
        steps=80, tokens_per_batch=256, peak_rate=1e-2, warmup_steps=5, device="cpu",
        prompt_noise=0.0, evaluations=2, max_minutes=5,
    )  # fmt: skip
    looks = list(optimise(network, examples, recipe, special_id(tokenizer, PAD)))
    assert [step for step, _ in looks] == [40, 80]
    assert looks[1][1] < looks[0][1]
    prompts = [tokenizer.encode(f"<|begin|><|user|>{q}<|end|><|assistant|>").ids for q, _ in pairs]
    found = complete_greedily(network.eval(), prompts, special_id(tokenizer, END), 20)
    assert [tokenizer.decode(ids) for ids in found] == [answer for _, answer in pairs]
