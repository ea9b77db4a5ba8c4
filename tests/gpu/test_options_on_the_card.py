"""Everything a request may ask of sampling, mixed with plain rows, against the CPU engine."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.request import (
    Request,
    RequestTimes,
    SampledToken,
    SamplingOptions,
    StoppingOptions,
)
from nanoinfer_engine.core.scheduler import Scheduler
from nanoinfer_engine.sampling.logprobs import measure, score
from nanoinfer_engine.sampling.shaping import shape
from nanoinfer_engine.step.runner import ModelRunner

from tests.gpu.test_runner import GREEDY, GUIDE, TIE, make_runner, prompts, transformers_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 40
ENDING = frozenset({3, 11, 25})
BIASED = tuple((token_id, 4.0) for token_id in range(100, 140))
ALLOWED = array("q", range(200, 900))
OPTIONS = [
    GREEDY,
    replace(GREEDY, repetition_penalty=1.3),
    replace(GREEDY, frequency_penalty=0.7, presence_penalty=0.2),
    replace(GREEDY, logit_bias=BIASED),
    replace(GREEDY, allowed_token_ids=ALLOWED),
    replace(GREEDY, allowed_token_ids=ALLOWED, presence_penalty=1.5, num_logprobs=3),
    replace(GREEDY, num_logprobs=4),
    replace(GREEDY, num_logprobs=0, logprob_token_ids=(5, 6, 7)),
    replace(GREEDY, num_prompt_logprobs=2, repetition_penalty=1.1),
    replace(GREEDY, num_prompt_logprobs=0, num_logprobs=1, logprob_token_ids=(9,)),
]


@dataclass
class Served:
    """What a client would have of one request."""

    request: Request
    tokens: list[SampledToken] = field(default_factory=list)
    prompt: tuple[SampledToken, ...] = ()
    error: Exception | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


def make_requests(
    texts: Sequence[tuple[int, ...]],
    options: Sequence[SamplingOptions] = OPTIONS,
    *,
    min_tokens: int = 0,
    num_tokens: int = NUM_TOKENS,
) -> list[Request]:
    """One for each text, the options in turn; with `min_tokens` ids of `ENDING` end them."""
    ending = ENDING if min_tokens else frozenset()
    stopping = StoppingOptions(num_tokens, min_tokens, ending, frozenset(), True)
    return [
        Request(str(i), 0, text, options[i % len(options)], stopping, RequestTimes(arrived=0))
        for i, text in enumerate(texts)
    ]


def serve(
    runner: ModelRunner,
    requests: Sequence[Request],
    kv_tokens: int | None = None,
    **changes: object,
) -> list[Served]:
    """Run all requests, sent at once, to their end."""
    config = EngineConfig(model_path=GUIDE, max_batch_tokens=512, max_batch_requests=64)
    tokens = kv_tokens or runner.num_blocks * runner.block_size
    scheduler = Scheduler(replace(config, **changes), Capacity(runner.max_model_len, tokens))  # type: ignore[arg-type]
    pipeline = Pipeline(runner)
    served = {request: Served(request) for request in requests}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work or pipeline.is_busy:
        step = pipeline.advance(scheduler.schedule())
        for output in scheduler.update(step.batch, step.results) if step else []:
            own = served[output.request]
            own.tokens += output.tokens
            own.prompt = own.prompt or output.prompt_logprobs
            own.error = own.error or output.error
    if kv_tokens is not None:
        assert scheduler.num_preemptions > 0
    return list(served.values())


@pytest.fixture(scope="module")
def card() -> ModelRunner:
    runner = make_runner("cuda", "float16")
    runner.warm_up()
    return runner


@pytest.fixture(scope="module")
def cpu() -> ModelRunner:
    return make_runner("cpu", "float32")


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return transformers_model()


def assert_same(
    actual: Sequence[Served], expected: Sequence[Served], reference: torch.nn.Module
) -> None:
    """Equal ids, but where the two best shaped logits are as good as tied; few of those."""
    diverged = 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.error is None
        assert theirs.error is None
        if ours.ids == theirs.ids:
            continue
        diverged += 1
        pairs = zip(ours.ids, theirs.ids, strict=False)
        place = next(i for i, (a, b) in enumerate(pairs) if a != b)
        best = shaped_logits(reference, theirs.request, theirs.ids[:place]).topk(2).values
        assert float(best[0] - best[1]) < TIE, (theirs.request.sampling, place, best)
    assert diverged <= max(len(actual) // 5, 1)


def shaped_logits(
    reference: torch.nn.Module, request: Request, completion: Sequence[int]
) -> torch.Tensor:
    """What `request` chooses from after `completion`, by transformers and the host's shaping."""
    from nanoinfer_engine.core.batch import BatchRow
    from nanoinfer_engine.core.request import TokenCounts

    counts = None
    if request.sampling.has_penalties:
        counts = TokenCounts(request.prompt_token_ids)
        for token_id in completion:
            counts.add(token_id)
    with torch.inference_mode():
        ids = torch.tensor([[*request.prompt_token_ids, *completion]])
        logits = reference(ids).logits[:, -1].float()
    masked = request.stopping.masked_token_ids(len(completion))
    row = BatchRow((0,), 0, (0,), True, request.sampling, masked, counts)
    return shape(logits, [row])[0]


def assert_logprobs_close(actual: Sequence[Served], expected: Sequence[Served]) -> None:
    """As far as both have the same ids before: values as close as half precision leaves logits of
    up to 32 (spacing: 1/64), ranks mostly the same. PyTorch's FP16 on a CPU differs by 0.003 in
    the mean, by 0.019 at the 99th percentile and by 0.043 at most.
    """
    num_ranks = num_same = 0
    differences = []
    for ours, theirs in zip(actual, expected, strict=True):
        assert len(ours.prompt) == len(theirs.prompt)
        pairs = list(zip(ours.prompt, theirs.prompt, strict=True))
        for a, b in zip(ours.tokens, theirs.tokens, strict=False):
            if a.token_id != b.token_id:
                break
            pairs.append((a, b))
        for a, b in pairs:
            assert a.token_id == b.token_id
            assert (a.logprob is None) == (b.logprob is None)
            assert len(a.top) == len(b.top)
            if a.logprob is None or b.logprob is None:
                continue
            values = {each.token_id: each.logprob for each in (b.logprob, *b.top)}
            for each in (a.logprob, *a.top):
                if each.token_id in values:
                    differences.append(abs(each.logprob - values[each.token_id]))
            num_ranks += 1
            # behind the first few, the vocabulary lies too densely for the same rank
            num_same += abs(a.logprob.rank - b.logprob.rank) <= b.logprob.rank // 10
    assert num_ranks > 0
    assert num_same > 0.9 * num_ranks
    differences.sort()
    assert differences[-1] < 1 / 16
    assert differences[len(differences) * 99 // 100] < 1 / 32
    assert sum(differences) < len(differences) / 128


@pytest.mark.parametrize("min_tokens", [0, 15])
@pytest.mark.parametrize("count", [10, 40])
def test_options_mixed_in_one_batch(
    count: int,
    min_tokens: int,
    card: ModelRunner,
    cpu: ModelRunner,
    reference: torch.nn.Module,
) -> None:
    texts = prompts(count, 30 + count, longest=120)
    actual = serve(card, make_requests(texts, min_tokens=min_tokens))
    expected = serve(cpu, make_requests(texts, min_tokens=min_tokens))
    assert_same(actual, expected, reference)
    assert_logprobs_close(actual, expected)
    for each in actual:
        assert len(each.ids) >= (min_tokens or NUM_TOKENS)
        assert not min_tokens or not ENDING & set(each.ids[:min_tokens])
        if each.request.sampling.allowed_token_ids is not None:
            assert set(each.ids) <= set(ALLOWED) | ENDING


def test_no_row_keeps_its_batch_from_running_ahead(card: ModelRunner) -> None:
    steps = card._steps
    assert steps is not None
    num_ahead = num_decodes = 0
    launch = steps.launch

    def spy(batch: object) -> object:
        nonlocal num_ahead, num_decodes
        rows = batch.rows  # type: ignore[attr-defined]
        num_ahead += sum(row.source_row is not None for row in rows)
        num_decodes += sum(row.num_tokens == 1 for row in rows)
        return launch(batch)  # type: ignore[arg-type]

    steps.launch = spy  # type: ignore[assignment, method-assign]
    try:
        serve(card, make_requests(prompts(20, 3, longest=60), min_tokens=10))
    finally:
        del steps.launch
    assert num_ahead >= 0.95 * num_decodes


def test_preemption_keeps_the_counts(
    card: ModelRunner, cpu: ModelRunner, reference: torch.nn.Module
) -> None:
    texts = prompts(20, 8, longest=100)
    expected = serve(cpu, make_requests(texts))
    actual = serve(card, make_requests(texts), kv_tokens=1024)
    assert_same(actual, expected, reference)
    assert_logprobs_close(actual, expected)


def test_more_requests_than_slots_one_after_another(
    card: ModelRunner, cpu: ModelRunner, reference: torch.nn.Module
) -> None:
    source = random.Random(4)
    texts = [tuple(source.randrange(8000) for _ in range(8)) for _ in range(150)]
    options = OPTIONS[1:6]
    actual = serve(card, make_requests(texts, options, num_tokens=6))
    expected = serve(cpu, make_requests(texts, options, num_tokens=6))
    assert_same(actual, expected, reference)


def test_chunked_prompts_are_scored(
    card: ModelRunner, cpu: ModelRunner, reference: torch.nn.Module
) -> None:
    texts = prompts(8, 17, longest=300)
    options = [OPTIONS[8], OPTIONS[9], GREEDY]
    actual = serve(card, make_requests(texts, options, num_tokens=8), max_batch_tokens=64)
    expected = serve(cpu, make_requests(texts, options, num_tokens=8))
    assert_same(actual, expected, reference)
    assert_logprobs_close(actual, expected)


def test_a_row_without_any_id_left_ends_alone(card: ModelRunner) -> None:
    texts = prompts(4, 2, longest=40)
    nothing = replace(GREEDY, allowed_token_ids=array("q", [3]))
    outside = replace(GREEDY, logprob_token_ids=(1 << 30,), num_logprobs=0)
    options = [GREEDY, nothing, outside, OPTIONS[1]]
    served = serve(card, make_requests(texts, options, min_tokens=5))  # 3 is held back at first
    assert [each.error is not None for each in served] == [False, True, True, False]
    again = serve(card, make_requests(texts[:1], [GREEDY], min_tokens=5))
    assert again[0].error is None


def test_graphs_equal_eager_with_shaped_rows(card: ModelRunner) -> None:
    texts = prompts(8, 21, longest=60)
    options = [replace(each, temperature=0.8, top_p=0.9) for each in OPTIONS]
    with_graphs = serve(card, make_requests(texts, options))
    steps = card._steps
    assert steps is not None
    replay = steps.graphs.replay
    steps.graphs.replay = lambda n: steps.run_decode(steps.graphs.padded(n))  # type: ignore[method-assign]
    try:
        eager = serve(card, make_requests(texts, options))
    finally:
        steps.graphs.replay = replay  # type: ignore[method-assign]
    assert [each.tokens for each in with_graphs] == [each.tokens for each in eager]


@pytest.mark.parametrize("num_listed", [0, 1, 7, 128])
def test_scores_on_the_card_are_those_of_the_host(num_listed: int) -> None:
    generator = torch.Generator().manual_seed(num_listed)
    logits = (3 * torch.randn(16, 151936, generator=generator)).half()
    listed = tuple(range(50, 50 + num_listed))
    token_ids = torch.randint(151936, (16,), generator=generator).tolist()
    expected = score(logits.float(), token_ids, 5, listed)
    asked = torch.tensor([[each, *listed] for each in token_ids], device="cuda")
    scores = measure(logits.cuda(), asked, 5)
    for index, token in enumerate(expected):
        assert token.logprob is not None
        assert abs(float(scores.values[index, 0]) - token.logprob.logprob) < 1e-4
        # half-precision logits tie by the hundreds: an id more or less where the last bit rounds
        assert abs(int(scores.ranks[index, 0]) - token.logprob.rank) <= 200
        by_value = sorted(float(each) for each in scores.top_values[index])
        assert by_value == pytest.approx(sorted(e.logprob for e in token.top[:5]), abs=1e-4)
    own = torch.log_softmax(logits.cuda(), -1, dtype=torch.float32)
    larger = (own.unsqueeze(1) > scores.values.unsqueeze(2)[:, :4]).sum(-1) + 1
    assert torch.equal(scores.ranks[:, :4], larger)
