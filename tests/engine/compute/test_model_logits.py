"""Every supported architecture against transformers, whole, chunked, mixed and generated."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow

from tests.engine.compute.driver import GREEDY, AllLogits, Job, make_runner, run
from tests.engine.tiny_checkpoints import KINDS, VOCAB_SIZE, make_checkpoint, make_model

TOLERANCE = 1e-4
TIE = 1e-4


@cache
def reference_model(kind: str) -> torch.nn.Module:
    return make_model(kind)


def reference_logits(kind: str, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference_model(kind)(torch.tensor([token_ids])).logits[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_checkpoint(kind, root / kind) for kind in KINDS}


def prompt(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= TOLERANCE
    # the weights spread the logits: equality of near-constant vectors would prove nothing
    assert expected.std().item() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_whole_prompt(kind: str, checkpoints: dict[str, Path]) -> None:
    tokens = prompt(100, 1)
    model = AllLogits(checkpoints[kind])
    (logits,) = model.step([BatchRow(tuple(tokens), 0, tuple(range(40, 53)), True, GREEDY)])
    assert_close(logits, reference_logits(kind, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_and_mixed(kind: str, checkpoints: dict[str, Path]) -> None:
    """Rows in prefill, in a later chunk and in decode share each step; blocks lie scattered."""
    model = AllLogits(checkpoints[kind])
    source = random.Random(3)
    deal = list(range(model.num_blocks))
    source.shuffle(deal)
    rows = [prompt(length, length) for length in (97, 64, 30, 5, 41)]
    blocks = [[deal.pop() for _ in range(-(-len(row) // 8))] for row in rows]
    done = [0] * len(rows)
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    while any(done[i] < len(rows[i]) for i in range(len(rows))):
        live = [i for i in range(len(rows)) if done[i] < len(rows[i])]
        source.shuffle(live)
        sizes = {i: source.choice((1, 1, 3, 8, 17)) for i in live}
        stops = {i: min(done[i] + sizes[i], len(rows[i])) for i in live}
        batch = [
            BatchRow(
                tuple(rows[i][done[i] : stops[i]]),
                done[i],
                tuple(blocks[i][: -(-stops[i] // 8)]),
                True,
                GREEDY,
            )
            for i in live
        ]
        for i, logits in zip(live, model.step(batch), strict=True):
            parts[i].append(logits)
            done[i] = stops[i]
    for row, logits in zip(rows, parts, strict=True):
        assert_close(torch.cat(logits), reference_logits(kind, row))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [[], [41], [70, 3, 69, 41]])
def test_the_last_layer_of_kept_tokens_alone(
    kind: str, kept: list[int], checkpoints: dict[str, Path]
) -> None:
    """What is left out for the others is missed by nobody, in this step and in the next."""
    model = AllLogits(checkpoints[kind])
    texts = [prompt(42, 1), prompt(29, 2)]
    blocks = [tuple(range(6)), tuple(range(9, 13))]
    rows = [
        BatchRow(tuple(text), 0, own, True, GREEDY) for text, own in zip(texts, blocks, strict=True)
    ]
    expected = torch.cat([reference_logits(kind, text) for text in texts])
    logits = model.logits_of(rows, kept)
    assert logits.shape == (len(kept), VOCAB_SIZE)
    if kept:
        assert_close(logits, expected[kept])
    row = BatchRow((7,), 42, blocks[0], True, GREEDY)
    (following,) = model.step([row])
    assert_close(following, reference_logits(kind, [*texts[0], 7])[-1:])


def assert_greedy(kind: str, job: Job) -> None:
    """Each token is transformers' best for its prefix, unless the best two are as good as tied."""
    logits = reference_logits(kind, job.tokens)
    best = logits.topk(2)
    for offset, token in enumerate(job.output):
        position = len(job.prompt) + offset - 1
        gap = (best.values[position, 0] - best.values[position, 1]).item()
        assert token.token_id == best.indices[position, 0].item() or gap < TIE


@pytest.mark.matrix("R83")
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_alone_and_in_a_batch(kind: str, checkpoints: dict[str, Path]) -> None:
    runner = make_runner(checkpoints[kind])
    alone = Job(prompt(23, 9), 64)
    run(runner, [alone])
    assert_greedy(kind, alone)
    together = Job(prompt(23, 9), 64, chunk=5, starts_at=3)
    others = [
        Job(prompt(length, length), 40, chunk=chunk, starts_at=start)
        for length, chunk, start in ((50, 7, 0), (3, 3, 0), (33, 100, 10), (70, 16, 20))
    ]
    run(runner, [others[0], together, *others[1:]], seed=4)
    for job in (together, *others):
        assert_greedy(kind, job)
    assert together.tokens == alone.tokens
