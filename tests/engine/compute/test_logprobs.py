"""Log-probabilities of completion, prompt and listed ids, against a float64 log-softmax."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.core.batch import Batch, BatchRow, ScoredPrompt
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SampledToken, SamplingOptions
from nanoinfer_engine.sampling.logprobs import score, score_prompts

from tests.engine.compute.driver import GREEDY, make_runner
from tests.engine.tiny_checkpoints import VOCAB_SIZE, make_checkpoint, make_model

SCORED = SamplingOptions(0.0, 0, 1.0, 0.0, 0, num_prompt_logprobs=4, logprob_token_ids=(9, 200))


def test_listed_ids_follow_the_likeliest_without_repeating_them() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, -2.0]])
    (token,) = score(logits, [4], 2, (1, 4, 0, 3))
    assert token.logprob is not None
    assert (token.token_id, token.logprob.rank) == (4, 5)
    assert {each.token_id for each in token.top[:2]} < {1, 2, 3}
    listed = [each for each in token.top[2:] if each.token_id in (4, 0)]
    assert [(each.token_id, each.rank) for each in listed] == [(4, 5), (0, 4)]
    assert len({each.token_id for each in token.top}) == len(token.top)
    assert {each.token_id for each in token.top} >= {1, 4, 0, 3}
    expected = torch.log_softmax(logits.double(), -1)[0]
    for each in token.top:
        assert each.logprob == pytest.approx(float(expected[each.token_id]), abs=1e-6)
        assert each.rank == 1 + int((expected > expected[each.token_id]).sum())


def test_ranks_are_the_same_however_they_are_found() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    ids = [5, 17, 0, 299, 100, 44]
    plain = score(logits, ids, 0, ())
    listed = score(logits, ids, 0, (1,))
    assert [t.logprob for t in plain] == [t.logprob for t in listed]


def scored_row(prompt: list[int], start: int, stop: int, blocks: tuple[int, ...]) -> BatchRow:
    return BatchRow(
        tuple(prompt[start:stop]),
        start,
        blocks,
        samples=stop == len(prompt),
        sampling=SCORED,
        scored_token_ids=tuple(prompt[start + 1 : stop + 1]),
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind", ["llama2", "gpt2"])
def test_prompt_logprobs_are_those_of_transformers(kind: str, chunk: int, tmp_path: Path) -> None:
    source = random.Random(5)
    prompt = [source.randrange(VOCAB_SIZE) for _ in range(100)]
    runner = make_runner(make_checkpoint(kind, tmp_path), max_batch_tokens=200)
    blocks = tuple(range(3, 3 + 13))
    tokens: list[SampledToken] = []
    for start in range(0, len(prompt), chunk):
        stop = min(start + chunk, len(prompt))
        # another row before it, so that its hidden states do not lie at the beginning
        other = BatchRow((1, 2, 3), 0, (40,), True, GREEDY)
        plain, result = runner.launch(
            Batch((other, scored_row(prompt, start, stop, blocks[: -(-stop // 8)])))
        ).results()
        assert isinstance(plain, tuple)
        if start == len(prompt) - 1:
            assert isinstance(result, tuple)  # nothing of the prompt follows the last id
        else:
            assert isinstance(result, ScoredPrompt)
            assert bool(result.sampled) == (stop == len(prompt))
            tokens += result.tokens
    assert [token.token_id for token in tokens] == prompt[1:]
    with torch.inference_mode():
        logits = make_model(kind)(torch.tensor([prompt])).logits[0, :-1]
    expected = torch.log_softmax(logits.double(), -1)
    for position, token in enumerate(tokens):
        own = expected[position, token.token_id]
        assert token.logprob is not None
        assert abs(token.logprob.logprob - float(own)) <= 1e-4
        higher = expected[position] > own
        assert abs(token.logprob.rank - 1 - int(higher.sum())) <= 1
        likeliest = expected[position].topk(4).values.tolist()
        assert [each.logprob for each in token.top[:4]] == pytest.approx(likeliest, abs=1e-4)
        assert {each.token_id for each in token.top} >= {9, 200}
        for each in token.top:
            assert abs(each.logprob - float(expected[position, each.token_id])) <= 1e-4


def test_a_prompt_that_cannot_be_scored_fails_alone() -> None:
    rows = [scored_row([1, 2, 3], 0, 2, (0,)) for _ in range(3)]
    hidden = torch.randn(6, VOCAB_SIZE)
    hidden[2] = torch.nan
    results = score_prompts(rows, hidden, [()] * 3, lambda part: part)
    assert isinstance(results[1], SamplingError)
    assert isinstance(results[0], ScoredPrompt)
    assert isinstance(results[2], ScoredPrompt)
