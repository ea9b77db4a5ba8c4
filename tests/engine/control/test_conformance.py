"""Field by field, on a real tiny model: unset is the default, zero is zero, bounds hold.

One beyond a bound is INVALID_ARGUMENT and names the field; what this engine lacks is UNIMPLEMENTED
and names the feature. Nothing is accepted and ignored.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from nanoinfer.v1 import engine_pb2
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_engine.step.runner import ModelRunner

from tests.engine.control.conftest import Engine, start_engine
from tests.engine.tiny_checkpoints import VOCAB_SIZE, make_model

PROMPT = [5, 17, 42, 99, 3]
SIX = pb.StoppingParams(max_tokens=6, ignore_eos=True)
MAX_LEN = 256


def sampling(**fields: Any) -> pb.SamplingParams:
    return pb.SamplingParams(**({"seed": 7} | fields))


async def tokens(engine: Engine, **fields: Any) -> list[int]:
    return (await engine.generate(PROMPT, stopping=SIX, sampling=sampling(**fields))).tokens()


@pytest.fixture(scope="module")
def greedy_tokens() -> list[int]:
    """What transformers chooses."""
    model = make_model("llama2")
    output = model.generate(  # type: ignore[operator]
        torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    chosen: list[int] = output[0, len(PROMPT) :].tolist()
    return chosen


async def test_greedy_tokens_are_those_of_transformers(
    tiny: Engine, greedy_tokens: list[int]
) -> None:
    for temperature in (0.0, 0.9e-5):
        assert await tokens(tiny, temperature=temperature) == greedy_tokens
    assert await tokens(tiny, top_k=1) == greedy_tokens


async def test_unset_is_what_the_model_publishes(tiny: Engine) -> None:
    reply = await tiny.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
    defaults = reply.model.default_sampling
    fields = {field.name for field, _ in defaults.ListFields()}
    assert fields == {f.name for f in pb.SamplingParams.DESCRIPTOR.fields} - {
        "seed",
        "logit_bias",
        "allowed_token_ids",
    }
    explicit = {name: getattr(defaults, name) for name in fields}
    assert await tokens(tiny) == await tokens(tiny, **explicit)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (1, 1, 0)


async def test_defaults_come_from_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text(
        '{"temperature": 0.25, "top_p": 0.5, "top_k": 3, "min_p": 0.125, "eos_token_id": [2, 4],'
        ' "repetition_penalty": 8}'
    )
    async with start_engine(ModelRunner, model=copy, kv_cache_memory="4MiB") as engine:
        reply = await engine.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
        model = reply.model
        found = model.default_sampling
        assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.25, 0.5, 3, 0.125)
        assert found.repetition_penalty == 8
        assert list(model.eos_token_ids) == [2, 4]
        explicit = {"temperature": 0.25, "top_p": 0.5, "top_k": 3, "min_p": 0.125}
        explicit |= {"repetition_penalty": 8}
        assert await tokens(engine) == await tokens(engine, **explicit)
        # greedy, so that the penalty alone makes the difference; 1 is off, not the default
        greedy = await tokens(engine, temperature=0)
        assert greedy != await tokens(engine, temperature=0, repetition_penalty=1)
        # an explicit zero is a zero, not the default
        assert await tokens(engine, top_k=0, top_p=1, min_p=0, temperature=1) != await tokens(
            engine
        )


@pytest.mark.matrix("R18")
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 2.0},
        {"top_p": 1.0},
        {"top_p": 1e-6},
        {"top_k": 0},
        {"top_k": VOCAB_SIZE},
        {"top_k": 2**32 - 1},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"n": 1},
        {"n": 16},
    ],
)
async def test_sampling_bounds_are_accepted(tiny: Engine, values: dict[str, Any]) -> None:
    answer = await tiny.generate(PROMPT, stopping=SIX, sampling=sampling(**values))
    assert len(answer.finishes) == values.get("n", 1)
    assert all(len(answer.tokens(index)) == 6 for index in answer.finishes)


@pytest.mark.matrix("R16", "R18")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.01, 2.01, math.nan, math.inf)),
        *(("top_p", value) for value in (0.0, -0.1, 1.01, math.nan)),
        *(("min_p", value) for value in (-0.01, 1.01, math.inf)),
        *(("n", value) for value in (0, 17, 2**32 - 1)),
    ],
)
async def test_one_beyond_a_sampling_bound_is_refused(
    tiny: Engine, field: str, value: float
) -> None:
    refused = await tiny.refused(tokens(tiny, **{field: value}))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.info.reason == "INVALID_SAMPLING_PARAMS"
    assert refused.fields == [f"sampling.{field}"]


@pytest.mark.matrix("R19")
@pytest.mark.parametrize(
    ("field", "stopping"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 2**31}),
        ("min_tokens", {"max_tokens": 3, "min_tokens": 4}),
        ("stop_token_ids", {"stop_token_ids": [VOCAB_SIZE]}),
        ("stop_token_ids", {"stop_token_ids": [1] * 65}),
    ],
)
async def test_one_beyond_a_stopping_bound_is_refused(
    tiny: Engine, field: str, stopping: dict[str, Any]
) -> None:
    refused = await tiny.refused(tiny.generate(PROMPT, stopping=pb.StoppingParams(**stopping)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [name.partition("[")[0] for name in refused.fields] == [f"stopping.{field}"]


@pytest.mark.matrix("R4")
async def test_max_tokens_is_clamped_to_the_context(tiny: Engine) -> None:
    room = MAX_LEN - len(PROMPT)
    for stopping in (
        pb.StoppingParams(max_tokens=2**31 - 1, ignore_eos=True),
        pb.StoppingParams(ignore_eos=True),
    ):
        answer = await tiny.generate(PROMPT, stopping=stopping, sampling=sampling())
        assert len(answer.tokens()) == room
        assert answer.finishes[0].reason == pb.FINISH_REASON_LENGTH
    one = await tiny.generate(PROMPT, stopping=pb.StoppingParams(max_tokens=1))
    assert one.summary.usage.completion_tokens == 1


@pytest.mark.matrix("R51", "R83")
async def test_tokens_do_not_depend_on_company_or_preemption(tiny_model: Path) -> None:
    """Alone; then eight at once, with chunked prefill and memory for a third of them."""
    stopping = pb.StoppingParams(max_tokens=50, ignore_eos=True)
    prompts = [[(7 * i + j) % VOCAB_SIZE for j in range(10 + 9 * i)] for i in range(8)]
    params = [sampling(temperature=0 if i % 2 else 0.8, seed=i) for i in range(8)]
    cases = list(zip(prompts, params, strict=True))
    small = {"max_batch_tokens": 32, "max_batch_requests": 8, "threads": 1}
    async with start_engine(
        ModelRunner, model=tiny_model, kv_cache_memory="320KiB", **small
    ) as engine:
        alone = [
            (await engine.generate(prompt, sampling=params, stopping=stopping)).tokens()
            for prompt, params in cases
        ]
        together = await asyncio.gather(
            *(engine.generate(prompt, sampling=p, stopping=stopping) for prompt, p in cases)
        )
        assert [answer.tokens() for answer in together] == alone
        await engine.idle()
        assert engine.service._engine.statistics.counters["preemptions"] > 0


async def test_stopping_fields_do_what_they_say(tiny: Engine, greedy_tokens: list[int]) -> None:
    stop = greedy_tokens[2]
    first = greedy_tokens.index(stop)
    greedy = sampling(temperature=0)

    async def run(**fields: Any) -> Any:
        stopping = pb.StoppingParams(**({"max_tokens": 6, "ignore_eos": True} | fields))
        return await tiny.generate(PROMPT, stopping=stopping, sampling=greedy)

    stopped = await run(stop_token_ids=[stop])
    assert stopped.tokens() == greedy_tokens[:first]
    assert stopped.finishes[0].stop_match.token_id == stop
    kept = await run(stop_token_ids=[stop], include_stop_in_output=True)
    assert kept.tokens() == greedy_tokens[: first + 1]
    unkept = await run(stop_token_ids=[stop], include_stop_in_output=False)
    assert unkept.tokens() == stopped.tokens()
    later = await run(stop_token_ids=[stop], min_tokens=5)
    assert stop not in later.tokens()[:5]
    assert later.summary.usage.completion_tokens >= 5
    assert (await run(min_tokens=0)).tokens() == greedy_tokens
    assert len((await run(stop_token_ids=list(range(64)), min_tokens=6)).tokens()) == 6


@pytest.mark.parametrize("count", [0, 3, 20])
async def test_logprobs_bring_the_token_and_as_many_alternatives(tiny: Engine, count: int) -> None:
    answer = await tiny.generate(
        PROMPT, stopping=SIX, sampling=sampling(), response=pb.ResponseOptions(logprobs=count)
    )
    entries = [entry for m in answer.messages for d in m.deltas for entry in d.logprobs]
    assert [entry.token_id for entry in entries] == answer.tokens()
    for entry in entries:
        assert entry.logprob <= 0
        assert entry.rank >= 1
        assert len(entry.top) == count
        assert [top.rank for top in entry.top] == list(range(1, count + 1))
        assert sorted((t.logprob for t in entry.top), reverse=True) == [
            t.logprob for t in entry.top
        ]
    plain = await tiny.generate(PROMPT, stopping=SIX, sampling=sampling())
    assert plain.tokens() == answer.tokens()
    assert not any(d.logprobs for m in plain.messages for d in m.deltas)


@pytest.mark.matrix("R25")
async def test_too_many_logprobs_are_refused(tiny: Engine) -> None:
    refused = await tiny.refused(tiny.generate(PROMPT, response=pb.ResponseOptions(logprobs=21)))
    assert refused.fields == ["response.logprobs"]


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"response": pb.ResponseOptions(echo=True)}, "FEATURE_ECHO"),
        (
            {"structured_output": pb.StructuredOutput(regex="a+")},
            "FEATURE_STRUCTURED_OUTPUT",
        ),
    ],
)
async def test_what_the_engine_lacks_is_refused_by_name(
    tiny: Engine, fields: dict[str, Any], feature: str
) -> None:
    refused = await tiny.refused(tiny.generate(PROMPT, **fields))
    assert refused.code is grpc.StatusCode.UNIMPLEMENTED
    assert refused.info.reason == "FEATURE_DISABLED"
    assert refused.info.metadata["feature"] == feature


@pytest.mark.matrix("R3", "R27")
@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "INVALID_PROMPT"),
        ([VOCAB_SIZE], "INVALID_PROMPT"),
        ([2**32 - 1], "INVALID_PROMPT"),
        ([5] * MAX_LEN, "PROMPT_TOO_LONG"),
    ],
)
async def test_bad_prompts_are_refused(tiny: Engine, prompt: list[int], reason: str) -> None:
    refused = await tiny.refused(tiny.generate(prompt))
    assert (refused.code, refused.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_the_longest_prompt_leaves_room_for_one_token(tiny: Engine) -> None:
    answer = await tiny.generate([5] * (MAX_LEN - 1))
    assert answer.summary.usage.completion_tokens == 1
    assert answer.summary.usage.prompt_tokens == MAX_LEN - 1


async def test_the_envelope(tiny: Engine) -> None:
    named = await tiny.generate(PROMPT, stopping=SIX, model="tiny", cache_salt="s" * 64)
    assert named.summary.model == "tiny"
    assert len(named.summary.request_id) == 36
    labelled = await tiny.generate(PROMPT, stopping=SIX, request_id="x" * 128)
    assert labelled.summary.request_id == "x" * 128
    unknown = await tiny.refused(tiny.generate(PROMPT, model="other"))
    assert (unknown.code, unknown.info.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    for bad in ({"request_id": "x" * 129}, {"request_id": ""}, {"cache_salt": "s" * 65}):
        refused = await tiny.refused(tiny.generate(PROMPT, **bad))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == list(bad)
    urgent = await tiny.refused(tiny.generate(PROMPT, metadata=[("x-nanoinfer-priority", "101")]))
    assert urgent.info.reason == "INVALID_METADATA"


async def test_a_model_without_tokenizer_checks_no_fingerprint(tiny: Engine) -> None:
    reply = await tiny.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
    assert not reply.model.HasField("tokenizer_fingerprint")
    assert len(reply.model.weights_fingerprint) == 32
    answer = await tiny.generate(PROMPT, stopping=SIX, tokenizer_fingerprint=b"x" * 32)
    assert answer.summary.tokenizer_fingerprint == b""
    short = await tiny.refused(tiny.generate(PROMPT, tokenizer_fingerprint=b"x"))
    assert short.fields == ["tokenizer_fingerprint"]


@pytest.mark.matrix("R63")
async def test_another_tokenizer_is_a_mismatch(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "ranks.tiktoken"
    tokenizer.write_text("".join(f"{c} {i}\n" for i, c in enumerate(("YQ==", "Yg==", "YWI="))))
    async with start_engine(
        ModelRunner, model=tiny_model, tokenizer=tokenizer, kv_cache_memory="4MiB"
    ) as engine:
        reply = await engine.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
        own = reply.model.tokenizer_fingerprint
        assert len(own) == 32
        answer = await engine.generate(PROMPT, stopping=SIX, tokenizer_fingerprint=own)
        assert answer.summary.tokenizer_fingerprint == own
        wrong = await engine.refused(engine.generate(PROMPT, tokenizer_fingerprint=b"x" * 32))
        assert wrong.code is grpc.StatusCode.FAILED_PRECONDITION
        assert wrong.info.reason == "TOKENIZER_MISMATCH"
        assert wrong.info.metadata["modelFingerprint"] == own.hex()
        assert (await engine.generate(PROMPT, stopping=SIX)).tokens()


@pytest.mark.matrix("R8")
async def test_random_bytes_are_an_error_and_no_crash(tiny: Engine) -> None:
    async with grpc.aio.insecure_channel(tiny.server.address) as channel:
        raw = channel.unary_stream("/nanoinfer.v1.EngineService/Generate")
        for payload in (b"\xff" * 40, b"\x0a\xff\xff\xff\x7f", bytes(range(256))):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in raw(payload, timeout=5):
                    pass
            assert raised.value.code() in (
                grpc.StatusCode.UNKNOWN,
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.INVALID_ARGUMENT,
            )
    assert (await tiny.generate(PROMPT, stopping=SIX)).tokens()
