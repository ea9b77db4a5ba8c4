"""Penalties, bias, allowed ids, log-probabilities and truncation, field by field through gRPC."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
import torch
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_engine.server import messages
from nanoinfer_engine.step.runner import ModelRunner
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from tests.engine.control.conftest import Answer, Engine, start_engine
from tests.engine.tiny_checkpoints import VOCAB_SIZE, make_model

PROMPT = [5, 17, 42, 99, 3, 17]
NUM_TOKENS = 12
STOPPING = pb.StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
MAX_LEN = 256


async def tokens(engine: Engine, prompt: Sequence[int] = PROMPT, **fields: Any) -> list[int]:
    params = pb.SamplingParams(**({"temperature": 0, "seed": 3} | fields))
    return (await engine.generate(list(prompt), stopping=STOPPING, sampling=params)).tokens()


def reference(prompt: Sequence[int] = PROMPT, **processors: Any) -> list[int]:
    """What transformers chooses greedily with these logits processors."""
    model = make_model("llama2")
    output = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        logits_processor=LogitsProcessorList(processors.values()),
    )
    chosen: list[int] = output[0, len(prompt) :].tolist()
    return chosen


def raw_logprobs(ids: list[int]) -> torch.Tensor:
    """[positions, vocabulary] in float64: what each position of `ids` predicts."""
    with torch.inference_mode():
        return torch.log_softmax(make_model("llama2")(torch.tensor([ids])).logits[0].double(), -1)


class FrequencyAndPresence:
    """The definition, as a logits processor of transformers."""

    def __init__(self, frequency: float, presence: float) -> None:
        self.frequency, self.presence = frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, len(PROMPT) :], minlength=VOCAB_SIZE)
        return scores - self.frequency * counts - self.presence * (counts > 0)


@pytest.mark.parametrize("penalty", [0.4, 1.3, 10.0])
async def test_repetition_penalty_is_that_of_transformers(tiny: Engine, penalty: float) -> None:
    found = await tokens(tiny, repetition_penalty=penalty)
    assert found == reference(it=RepetitionPenaltyLogitsProcessor(penalty))
    assert found != reference()


@pytest.mark.parametrize("size", [1, 2])
async def test_no_ngram_comes_twice_as_in_transformers(tiny: Engine, size: int) -> None:
    prompt = PROMPT + reference()  # what it would repeat
    found = await tokens(tiny, prompt, no_repeat_ngram_size=size)
    expected = reference(prompt, it=NoRepeatNGramLogitsProcessor(size))
    assert found == expected
    assert found != reference(prompt)


@pytest.mark.parametrize(("frequency", "presence"), [(2.0, 0.0), (0.0, -2.0), (-2.0, 2.0)])
async def test_frequency_and_presence_are_as_defined(
    tiny: Engine, frequency: float, presence: float
) -> None:
    # a bias makes one id win again and again, for the penalties to work on
    bias = {7: 3.0}
    processor = SequenceBiasLogitsProcessor([[[key], value] for key, value in bias.items()])
    both = FrequencyAndPresence(frequency, presence)
    found = await tokens(
        tiny, logit_bias=bias, frequency_penalty=frequency, presence_penalty=presence
    )
    assert found == reference(penalties=both, bias=processor)
    assert found != reference(bias=processor)


async def test_bias_and_allowed_ids_decide(tiny: Engine) -> None:
    assert await tokens(tiny, logit_bias={9: 100}) == [9] * NUM_TOKENS
    banned = reference()[0]
    assert banned not in await tokens(tiny, logit_bias={banned: -100})
    assert set(await tokens(tiny, allowed_token_ids=[4, 250], temperature=2)) <= {4, 250}
    # what is not allowed stays so however much it is preferred
    assert set(await tokens(tiny, allowed_token_ids=[4], logit_bias={9: 100})) == {4}


NEUTRAL: list[dict[str, Any]] = [
    {"repetition_penalty": 1},
    {"frequency_penalty": 0},
    {"presence_penalty": 0},
    {"no_repeat_ngram_size": 0},
    {"logit_bias": {}},
    {"logit_bias": {1: 0}},
    {"allowed_token_ids": []},
    {"allowed_token_ids": range(VOCAB_SIZE)},
    {"allowed_token_ids": range(VOCAB_SIZE - 1, -1, -1)},
    {"min_p": 0},
]


@pytest.mark.parametrize("fields", NEUTRAL)
@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_neutral_value_is_as_if_unset(
    tiny: Engine, fields: dict[str, Any], temperature: float
) -> None:
    plain = await tokens(tiny, temperature=temperature)
    assert await tokens(tiny, temperature=temperature, **fields) == plain


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-45},
        {"repetition_penalty": 10},
        {"frequency_penalty": -2},
        {"frequency_penalty": 2},
        {"presence_penalty": -2},
        {"presence_penalty": 2},
        {"no_repeat_ngram_size": 64},
        {"logit_bias": {0: -100, VOCAB_SIZE - 1: 100}},
        {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), 1.5)},
        {"allowed_token_ids": [0]},
        {"allowed_token_ids": [VOCAB_SIZE - 1] * VOCAB_SIZE},
    ],
)
async def test_bounds_are_accepted(tiny: Engine, fields: dict[str, Any]) -> None:
    for temperature in (0, 1):
        found = await tokens(tiny, temperature=temperature, **fields)
        assert len(found) == NUM_TOKENS


@pytest.mark.matrix("R23")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("repetition_penalty", value) for value in (0, -1, 10.01, math.nan, math.inf)),
        *(("frequency_penalty", value) for value in (-2.01, 2.01, math.nan)),
        *(("presence_penalty", value) for value in (-2.01, 2.01, -math.inf)),
        *(("no_repeat_ngram_size", value) for value in (65, 2**32 - 1)),
        *(("logit_bias", {1: value}) for value in (-100.1, 100.1, math.nan)),
        ("logit_bias", {VOCAB_SIZE: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("allowed_token_ids", [VOCAB_SIZE]),
        ("allowed_token_ids", [2**32 - 1]),
        ("allowed_token_ids", [0] * (VOCAB_SIZE + 1)),
    ],
)
async def test_one_beyond_is_refused(tiny: Engine, field: str, value: Any) -> None:
    refused = await tiny.refused(tokens(tiny, **{field: value}))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.info.reason == "INVALID_SAMPLING_PARAMS"
    assert refused.fields == [f"sampling.{field}"]


async def test_allowed_ids_that_all_end_the_completion_need_no_min_tokens(tiny: Engine) -> None:
    sampling = pb.SamplingParams(allowed_token_ids=[2, 9])
    stopping = {"max_tokens": 5, "stop_token_ids": [9]}
    answer = await tiny.generate(PROMPT, sampling=sampling, stopping=pb.StoppingParams(**stopping))
    assert answer.finishes[0].reason == pb.FINISH_REASON_STOP
    assert answer.summary.usage.completion_tokens == 1
    refused = await tiny.refused(
        tiny.generate(
            PROMPT, sampling=sampling, stopping=pb.StoppingParams(min_tokens=1, **stopping)
        )
    )
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["sampling.allowed_token_ids"]


HOSTILE: list[dict[str, Any]] = [
    {"repetition_penalty": 1e-45, "temperature": 2},
    {"frequency_penalty": -2, "presence_penalty": -2, "temperature": 0},
    {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), 100.0)},
    {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), -100.0)},
    {"allowed_token_ids": [255]},
    {"no_repeat_ngram_size": 1},
    {"top_p": 1e-6, "min_p": 1, "top_k": 1},
]


@pytest.mark.matrix("R84")
async def test_hostile_rows_change_nobody_elses_tokens(tiny: Engine) -> None:
    victims: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1, "seed": 2**64 - 1},
        {"temperature": 1, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"temperature": 0.7, "logit_bias": {3: 5.0}, "top_p": 0.9},
    ]
    alone = [await tokens(tiny, **fields) for fields in victims]
    crowd = await asyncio.gather(*(tokens(tiny, **fields) for fields in [*victims, *HOSTILE] * 2))
    assert crowd[: len(victims)] == alone
    assert crowd[len(victims) + len(HOSTILE) :][: len(victims)] == alone


async def test_penalties_survive_preemption(tiny_model: Any) -> None:
    """Twelve at once in memory for a few: what was counted is not lost."""
    stopping = pb.StoppingParams(max_tokens=40, ignore_eos=True)
    params = pb.SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.3)
    prompts = [[(7 * i + j) % VOCAB_SIZE for j in range(20)] for i in range(8)]
    response = pb.ResponseOptions(prompt_logprobs=0)
    async with start_engine(
        ModelRunner, model=tiny_model, kv_cache_memory="320KiB", max_batch_tokens=16,
        max_batch_requests=8, threads=1,
    ) as engine:  # fmt: skip
        asked = {"sampling": params, "stopping": stopping, "response": response}
        alone = [await engine.generate(prompt, **asked) for prompt in prompts]
        together = await asyncio.gather(*(engine.generate(p, **asked) for p in prompts))
        assert [a.tokens() for a in together] == [a.tokens() for a in alone]
        for prompt, answer in zip(prompts, together, strict=True):
            assert [e.token_id for e in scores(answer)] == prompt[1:]
        assert engine.service._engine.statistics.counters["preemptions"] > 0


# ---- log-probabilities


def scores(answer: Answer) -> list[pb.TokenLogprob]:
    """The prompt's entries; the first message brings them, and no other."""
    assert not any(m.prompt_info.prompt_logprobs for m in answer.messages[1:])
    return list(answer.messages[0].prompt_info.prompt_logprobs)


def completion_entries(answer: Answer, index: int = 0) -> list[pb.TokenLogprob]:
    return [e for m in answer.messages for d in m.deltas if d.index == index for e in d.logprobs]


def check_entries(entries: Sequence[pb.TokenLogprob], ids: list[int], first: int) -> None:
    """Entries for `ids[first:]` against transformers."""
    assert [entry.token_id for entry in entries] == ids[first:]
    expected = raw_logprobs(ids)
    for position, entry in enumerate(entries, first - 1):
        for found in (entry, *entry.top):
            own = expected[position, found.token_id]
            assert abs(found.logprob - float(own)) <= 1e-4
            assert abs(found.rank - 1 - int((expected[position] > own).sum())) <= 1


@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
async def test_prompt_logprobs_are_those_of_transformers(
    tiny: Engine, count: int, length: int
) -> None:
    """The engine's steps have 64 tokens: long prompts are computed in several."""
    prompt = [(31 * i + 7) % VOCAB_SIZE for i in range(length)]
    asked = {"response": pb.ResponseOptions(prompt_logprobs=count), "stopping": STOPPING}
    for _ in range(2):  # again, where a prefix cache would have it
        answer = await tiny.generate(prompt, sampling=pb.SamplingParams(temperature=0), **asked)
        entries = scores(answer)
        check_entries(entries, prompt, 1)
        assert all([top.rank for top in e.top] == list(range(1, count + 1)) for e in entries)
        assert not completion_entries(answer)
    plain = await tiny.generate(
        prompt, sampling=pb.SamplingParams(temperature=0), stopping=STOPPING
    )
    assert answer.tokens() == plain.tokens()
    assert not scores(plain)


@pytest.mark.parametrize("count", [None, 0, 2])
async def test_listed_ids_follow_the_alternatives(tiny: Engine, count: int | None) -> None:
    listed = [200, 4, 4, 0, VOCAB_SIZE - 1]
    response = pb.ResponseOptions(logprob_token_ids=listed, logprobs=count, prompt_logprobs=1)
    answer = await tiny.generate(PROMPT, stopping=STOPPING, response=response)
    ids = PROMPT + answer.tokens()
    check_entries(completion_entries(answer), ids, len(PROMPT))
    check_entries(scores(answer), PROMPT, 1)
    for num_top, entries in ((count or 0, completion_entries(answer)), (1, scores(answer))):
        for entry in entries:
            best = [top.token_id for top in entry.top[:num_top]]
            rest = [token_id for token_id in (200, 4, 0, 255) if token_id not in best]
            assert [top.token_id for top in entry.top[num_top:]] == rest
    unlisted = await tiny.generate(
        PROMPT, stopping=STOPPING, response=pb.ResponseOptions(logprob_token_ids=[])
    )
    assert not completion_entries(unlisted)


async def test_log_probabilities_are_those_before_everything(tiny: Engine) -> None:
    params = pb.SamplingParams(
        temperature=0.5,
        seed=1,
        repetition_penalty=3,
        logit_bias={4: 10.0},
        allowed_token_ids=range(0, VOCAB_SIZE, 2),
    )
    response = pb.ResponseOptions(logprobs=2, logprob_token_ids=[4])
    answer = await tiny.generate(PROMPT, sampling=params, stopping=STOPPING, response=response)
    check_entries(completion_entries(answer), PROMPT + answer.tokens(), len(PROMPT))


async def test_several_completions_share_one_scored_prompt(tiny: Engine) -> None:
    prompt = [(13 * i) % VOCAB_SIZE for i in range(150)]
    response = pb.ResponseOptions(prompt_logprobs=0, logprobs=0)
    params = pb.SamplingParams(n=4, seed=5)
    await tiny.generate(prompt, stopping=STOPPING)  # so that the others may find it cached
    answer = await tiny.generate(prompt, sampling=params, stopping=STOPPING, response=response)
    check_entries(scores(answer), prompt, 1)
    plain = await tiny.generate(prompt, sampling=params, stopping=STOPPING)
    for index in range(4):
        assert answer.tokens(index) == plain.tokens(index)
        check_entries(completion_entries(answer, index), prompt + answer.tokens(index), 150)


@pytest.mark.matrix("R25")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_logprobs", 21),
        ("logprob_token_ids", [VOCAB_SIZE]),
        ("logprob_token_ids", [1] * 129),
    ],
)
async def test_one_beyond_a_response_bound_is_refused(tiny: Engine, field: str, value: Any) -> None:
    refused = await tiny.refused(
        tiny.generate(PROMPT, response=pb.ResponseOptions(**{field: value}))
    )
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == [f"response.{field}"]


async def test_scores_that_would_not_fit_a_message_are_refused(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = pb.ResponseOptions(prompt_logprobs=1, logprob_token_ids=[1, 2, 2])
    monkeypatch.setattr(messages, "MAX_PROMPT_ENTRIES", len(PROMPT) * 4)
    assert len(scores(await tiny.generate(PROMPT, response=listed))) == len(PROMPT) - 1
    monkeypatch.setattr(messages, "MAX_PROMPT_ENTRIES", len(PROMPT) * 4 - 1)
    refused = await tiny.refused(tiny.generate(PROMPT, response=listed))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["response.prompt_logprobs"]
    assert (await tiny.generate(PROMPT, response=pb.ResponseOptions(logprobs=20))).tokens()


async def test_as_many_listed_ids_as_may_be(tiny: Engine) -> None:
    listed = list(range(128))
    answer = await tiny.generate(
        PROMPT, stopping=STOPPING, response=pb.ResponseOptions(logprob_token_ids=listed)
    )
    for entry in completion_entries(answer):
        assert [top.token_id for top in entry.top] == listed


# ---- truncation and what is published


@pytest.mark.parametrize("last", [1, 4, 6, 7, MAX_LEN - 1])
async def test_a_prompts_last_ids_are_kept(tiny: Engine, last: int) -> None:
    asked = {"stopping": STOPPING, "sampling": pb.SamplingParams(temperature=0)}
    cut = await tiny.generate(PROMPT, truncate_prompt_tokens=last, **asked)
    kept = PROMPT[-last:]
    assert cut.tokens() == (await tiny.generate(kept, **asked)).tokens()
    assert cut.messages[0].prompt_info.prompt_tokens == len(kept)
    assert cut.summary.usage.prompt_tokens == len(kept)


async def test_a_prompt_beyond_the_context_may_be_cut(tiny: Engine) -> None:
    long = [5] * 1000
    cut = await tiny.generate(long, truncate_prompt_tokens=MAX_LEN - 1)
    assert cut.summary.usage.prompt_tokens == MAX_LEN - 1
    for last in (0, MAX_LEN):
        refused = await tiny.refused(tiny.generate(long, truncate_prompt_tokens=last))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["truncate_prompt_tokens"]
    assert (await tiny.refused(tiny.generate(long))).info.reason == "PROMPT_TOO_LONG"


async def test_what_the_engine_has_is_published(tiny: Engine) -> None:
    reply = await tiny.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
    gateways_or_later = {pb.FEATURE_UNSPECIFIED, pb.FEATURE_ECHO, pb.FEATURE_STRUCTURED_OUTPUT}
    assert set(reply.model.features) == set(pb.Feature.values()) - gateways_or_later
