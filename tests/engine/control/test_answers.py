"""Messages of one stream: what waits for the prompt's log-probabilities, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from nanoinfer.v1 import engine_pb2
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.request import (
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    SampledToken,
)
from nanoinfer_engine.core.stream import Stream
from nanoinfer_engine.server.answers import Answer
from nanoinfer_engine.server.messages import ServedModel
from nanoinfer_engine.weights.generation_config import SamplingDefaults

from tests.engine.fakes import make_request

MODEL = ServedModel(
    name="fake",
    architecture="fake",
    dtype="float32",
    vocab_size=100,
    num_parameters=0,
    capacity=Capacity(64, 64),
    eos_token_ids=(),
    defaults=SamplingDefaults(),
    tokenizer_fingerprint=None,
    weights_fingerprint=b"",
)
SCORES = (SampledToken(12, Logprob(12, -1.0, 2)), SampledToken(13, Logprob(13, -2.0, 5)))


def scoring(index: int, prompt: Sequence[int] = (11, 12, 13)) -> Request:
    """Of several completions the first alone scores the prompt."""
    request = make_request(prompt, index=index)
    asked = None if index else 0
    request.sampling = replace(request.sampling, num_prompt_logprobs=asked)
    return request


def answer_of(*requests: Request) -> Answer:
    return Answer(Stream(requests, lambda requests, error=None: None), MODEL)


def token(request: Request, token_id: int, **more: object) -> RequestOutput:
    return RequestOutput(request, (SampledToken(token_id),), **more)  # type: ignore[arg-type]


def ids(message: engine_pb2.EngineServiceGenerateResponse | None) -> dict[int, list[int]]:
    assert message is not None
    return {delta.index: list(delta.token_ids) for delta in message.deltas}


async def test_what_comes_before_the_prompts_scores_waits_for_them() -> None:
    first, second = scoring(0), scoring(1)
    answer = answer_of(first, second)
    assert answer.message([token(second, 1)]) is None
    assert answer.message([token(second, 2)]) is None
    message = answer.message([token(first, 3, prompt_logprobs=SCORES), token(second, 4)])
    assert ids(message) == {0: [3], 1: [1, 2, 4]}
    assert message is not None
    found = [(e.token_id, e.logprob, e.rank) for e in message.prompt_info.prompt_logprobs]
    assert found == [(12, -1.0, 2), (13, -2.0, 5)]
    assert message.prompt_info.prompt_tokens == 3
    after = answer.message([token(second, 5)])
    assert ids(after) == {1: [5]}
    assert after is not None
    assert not after.HasField("prompt_info")


async def test_nothing_waits_where_there_are_no_scores_to_come() -> None:
    one_token = answer_of(scoring(0, [11]), scoring(1, [11]))
    assert ids(one_token.message([token(scoring(1), 1)])) == {1: [1]}
    unasked = answer_of(make_request(index=0), make_request(index=1))
    assert ids(unasked.message([token(scoring(1), 1)])) == {1: [1]}


async def test_a_failure_leaves_what_waits_unsent() -> None:
    first, second = scoring(0), scoring(1)
    answer = answer_of(first, second)
    assert answer.message([token(second, 1)]) is None
    failed = RequestOutput(first, finish_reason=FinishReason.ERROR, error=RuntimeError("lost"))
    assert answer.message([failed]) is None
    assert answer.num_sent_tokens == 0


@pytest.mark.parametrize("stated", [set(), {"temperature"}, {"top_k", "min_p"}])
def test_a_model_publishes_which_defaults_its_checkpoint_states(stated: set[str]) -> None:
    defaults = SamplingDefaults(0.0, 0.5, 7, 0.25, stated=frozenset(stated))
    info = replace(MODEL, defaults=defaults).info()
    assert info.HasField("stated_sampling")
    assert {field.name for field, _ in info.stated_sampling.ListFields()} == stated
    for name in stated:
        published = getattr(info.default_sampling, name)
        assert getattr(info.stated_sampling, name) == published == getattr(defaults, name)
