"""Text in, text out over three real processes."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from nanoinfer.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    generation_pb2,
    tokenizer_pb2,
)

from tests.e2e.conftest import await_idle
from tests.waiting import DEADLINES

QUESTION = "What is a KV cache?"


def user(text: str) -> tokenizer_pb2.ChatMessage:
    return tokenizer_pb2.ChatMessage(role="user", content=[tokenizer_pb2.ContentPart(text=text)])


def greedy(max_tokens: int = 64, **options: object) -> gateway_pb2.GenerationOptions:
    return gateway_pb2.GenerationOptions(
        sampling=generation_pb2.SamplingParams(temperature=0),
        stopping=generation_pb2.StoppingParams(max_tokens=max_tokens),
        **options,  # type: ignore[arg-type]
    )


def chat_text(gateway: gateway_pb2_grpc.GatewayServiceStub, text: str) -> str:
    request = gateway_pb2.GatewayServiceChatRequest(messages=[user(text)], options=greedy())
    return str(gateway.Chat(request, timeout=60).choices[0].text)


def test_chat_answers_sensibly(gateway: gateway_pb2_grpc.GatewayServiceStub) -> None:
    answer = chat_text(gateway, QUESTION).lower()
    assert "key" in answer
    assert "value" in answer


def test_stream_is_the_unary_result_in_pieces(
    gateway: gateway_pb2_grpc.GatewayServiceStub,
) -> None:
    request = gateway_pb2.GatewayServiceChatStreamRequest(
        messages=[user(QUESTION)], options=greedy()
    )
    messages = list(gateway.ChatStream(request, timeout=60))
    text = "".join(delta.text for message in messages for delta in message.deltas)
    assert text == chat_text(gateway, QUESTION)
    assert len(messages) > 3, "it was not streamed"
    assert messages[0].prompt_info.prompt_tokens > 0
    assert [m.HasField("summary") for m in messages].count(True) == 1
    summary = messages[-1].summary
    assert summary.usage.prompt_tokens == messages[0].prompt_info.prompt_tokens
    assert summary.usage.completion_tokens > 3
    timings = summary.timings
    assert timings.tokenize_ns > 0
    assert timings.prefill_ns > 0
    assert timings.decode_ns > 0
    assert timings.total_ns >= timings.prefill_ns + timings.decode_ns
    assert timings.total_ns >= timings.time_to_first_token_ns > 0
    finish = next(f for m in messages for f in m.finishes)
    assert finish.reason == generation_pb2.FINISH_REASON_STOP
    assert finish.stop_match.eos


@pytest.mark.matrix("R26")
def test_seed_is_echoed_and_reproduces(gateway: gateway_pb2_grpc.GatewayServiceStub) -> None:
    def sample(seed: int | None) -> gateway_pb2.GatewayServiceGenerateResponse:
        options = gateway_pb2.GenerationOptions(
            sampling=generation_pb2.SamplingParams(temperature=1.5, seed=seed, n=3),
            stopping=generation_pb2.StoppingParams(max_tokens=16, ignore_eos=True),
        )
        request = gateway_pb2.GatewayServiceGenerateRequest(text="def main", options=options)
        return gateway.Generate(request, timeout=60)

    drawn = sample(None)
    first = sample(drawn.choices[0].finish.seed)
    assert [c.text for c in first.choices] == [c.text for c in drawn.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len({c.text for c in first.choices}) == 3
    assert drawn.summary.usage.completion_tokens == 48


def test_stop_string_over_token_borders_does_not_leak(
    gateway: gateway_pb2_grpc.GatewayServiceStub,
    engine: engine_pb2_grpc.EngineServiceStub,
) -> None:
    whole = chat_text(gateway, QUESTION)
    for start in range(5, min(len(whole) - 8, 60), 7):
        stop = whole[start : start + 6]
        request = gateway_pb2.GatewayServiceChatStreamRequest(
            messages=[user(QUESTION)], options=greedy(stop=[stop])
        )
        messages = list(gateway.ChatStream(request, timeout=60))
        text = "".join(delta.text for message in messages for delta in message.deltas)
        assert text == whole[: whole.index(stop)]
        finish = next(f for m in messages for f in m.finishes)
        assert finish.stop_match.stop == stop
        summary = messages[-1].summary
        assert summary.usage.completion_tokens > 0
        assert summary.timings.queue_ns > 0
        assert summary.timings.prefill_ns > 0
    await_idle(engine)


@pytest.mark.parametrize("way", ["cancel", "close", "deadline"])
def test_an_ended_stream_gives_its_blocks_back(
    gateway: gateway_pb2_grpc.GatewayServiceStub,
    engine: engine_pb2_grpc.EngineServiceStub,
    stack: object,
    way: str,
) -> None:
    options = gateway_pb2.GenerationOptions(
        stopping=generation_pb2.StoppingParams(max_tokens=900, ignore_eos=True)
    )
    request = gateway_pb2.GatewayServiceGenerateStreamRequest(text="import os", options=options)
    if way == "close":
        with grpc.insecure_channel(stack.gateway.address) as channel:  # type: ignore[attr-defined]
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            next(iter(stub.GenerateStream(request, timeout=60)))
    elif way == "cancel":
        stream = gateway.GenerateStream(request, timeout=60)
        next(stream)
        load = engine.GetLoad(engine_pb2.EngineServiceGetLoadRequest(), timeout=60).load
        assert load.running_requests == 1
        assert load.kv_cache_usage > 0
        stream.cancel()
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
        assert error.value.code().name == "CANCELLED"  # type: ignore[attr-defined]
    else:
        messages: list[object] = []
        for seconds in DEADLINES:
            with pytest.raises(grpc.RpcError) as error:
                messages.extend(gateway.GenerateStream(request, timeout=seconds))
            assert error.value.code().name == "DEADLINE_EXCEEDED"  # type: ignore[attr-defined]
            if messages:
                break
        assert messages
    await_idle(engine)


def reason(error: grpc.RpcError) -> tuple[str, str, list[str]]:
    """Status code, ErrorInfo reason and the violated fields of an error."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details if status else []:
        detail.Unpack(info)
        detail.Unpack(bad)
    fields = [violation.field for violation in bad.field_violations]
    return error.code().name, info.reason, fields  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"sampling": {"temperature": float("nan")}}, "INVALID_ARGUMENT", "sampling.temperature"),
        ({"sampling": {"top_p": 0.0}}, "INVALID_ARGUMENT", "sampling.top_p"),
        ({"sampling": {"n": 17}}, "INVALID_ARGUMENT", "sampling.n"),
        ({"stopping": {"max_tokens": 0}}, "INVALID_ARGUMENT", "stopping.max_tokens"),
        ({"stopping": {"stop_token_ids": [10**6]}}, "INVALID_ARGUMENT", "stopping.stop_token_ids"),
        ({"stop": [""]}, "INVALID_ARGUMENT", "stop"),
        ({"stop": ["x" * 257]}, "INVALID_ARGUMENT", "stop"),
        ({"response": {"logprobs": 21}}, "INVALID_ARGUMENT", "response.logprobs"),
        ({"response": {"prompt_logprobs": 21}}, "INVALID_ARGUMENT", "response.prompt_logprobs"),
        (
            {"sampling": {"repetition_penalty": 0.0}},
            "INVALID_ARGUMENT",
            "sampling.repetition_penalty",
        ),
        ({"sampling": {"logit_bias": {8192: 2.0}}}, "INVALID_ARGUMENT", "sampling.logit_bias"),
        (
            {"sampling": {"allowed_token_ids": [8192]}},
            "INVALID_ARGUMENT",
            "sampling.allowed_token_ids",
        ),
        ({"truncate_prompt_tokens": 2048}, "INVALID_ARGUMENT", "truncate_prompt_tokens"),
        ({"structured_output": {"regex": "a+"}}, "UNIMPLEMENTED", ""),
        ({"model": "another"}, "NOT_FOUND", ""),
    ],
)
def test_bad_options_are_refused_with_a_reason(
    gateway: gateway_pb2_grpc.GatewayServiceStub, options: dict[str, object], code: str, field: str
) -> None:
    request = gateway_pb2.GatewayServiceGenerateRequest(
        text="x",
        options=gateway_pb2.GenerationOptions(**options),  # type: ignore[arg-type]
    )
    with pytest.raises(grpc.RpcError) as error:
        gateway.Generate(request, timeout=10)
    found, why, fields = reason(error.value)
    assert found == code
    assert why
    assert not field or any(name.startswith(field) for name in fields), fields


def test_a_prompt_beyond_the_context_is_refused(
    gateway: gateway_pb2_grpc.GatewayServiceStub,
) -> None:
    request = gateway_pb2.GatewayServiceGenerateRequest(text="word " * 5000)
    with pytest.raises(grpc.RpcError) as error:
        gateway.Generate(request, timeout=10)
    assert reason(error.value)[:2] == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")


@pytest.mark.matrix("R14")
def test_special_token_text_in_a_message_stays_text(
    gateway: gateway_pb2_grpc.GatewayServiceStub,
) -> None:
    def count(text: str) -> int:
        conversation = gateway_pb2.Conversation(messages=[user(text)])
        request = gateway_pb2.GatewayServiceCountTokensRequest(conversation=conversation)
        return int(gateway.CountTokens(request, timeout=10).num_tokens)

    assert count("a<|end|>b") > count("a-b") + 1


def test_models_publish_their_defaults(gateway: gateway_pb2_grpc.GatewayServiceStub) -> None:
    models = gateway.ListModels(gateway_pb2.GatewayServiceListModelsRequest(), timeout=10).models
    assert [model.id for model in models] == ["guide"]
    request = gateway_pb2.GatewayServiceGetModelInfoRequest(model="guide")
    model = gateway.GetModelInfo(request, timeout=10).model
    assert model == models[0]
    unset = {
        f.name
        for f in model.default_sampling.DESCRIPTOR.fields
        if f.has_presence and f.name != "seed" and not model.default_sampling.HasField(f.name)
    }
    assert unset == set()
    assert model.stated_sampling == generation_pb2.SamplingParams(temperature=0)  # do_sample: false
    assert len(model.tokenizer_fingerprint) == 32
    assert len(model.weights_fingerprint) == 32


def test_options_of_the_choice_work_from_text_to_text(
    gateway: gateway_pb2_grpc.GatewayServiceStub,
) -> None:
    """Through all three services: echo, cut, scores, penalties, bias."""
    text = "A KV cache holds keys and values."

    def complete(
        sampling: dict[str, object], **options: object
    ) -> gateway_pb2.GatewayServiceGenerateResponse:
        asked = gateway_pb2.GenerationOptions(
            sampling=generation_pb2.SamplingParams(temperature=0, **sampling),  # type: ignore[arg-type]
            stopping=generation_pb2.StoppingParams(max_tokens=12, ignore_eos=True),
            **options,  # type: ignore[arg-type]
        )
        request = gateway_pb2.GatewayServiceGenerateRequest(text=text, options=asked)
        return gateway.Generate(request, timeout=60)

    plain = complete({})
    scored = complete({}, response={"echo": True, "prompt_logprobs": 1, "logprobs": 0})
    assert scored.choices[0].text == text + plain.choices[0].text
    prompt_scores = scored.prompt_info.prompt_logprobs
    assert len(prompt_scores) == scored.prompt_info.prompt_tokens - 1
    assert text.encode().endswith(b"".join(entry.token for entry in prompt_scores))
    assert all(entry.logprob <= entry.top[0].logprob <= 0 for entry in prompt_scores)
    cut = complete({}, response={"echo": True}, truncate_prompt_tokens=3)
    assert cut.prompt_info.prompt_tokens == 3
    kept = b"".join(entry.token for entry in prompt_scores[-3:]).decode()
    assert cut.choices[0].text.startswith(kept)
    assert text.endswith(kept)
    penalised = complete({"repetition_penalty": 10.0, "frequency_penalty": 2.0})
    assert penalised.choices[0].text != plain.choices[0].text
    favoured = prompt_scores[-1].token_id
    biased = complete({"logit_bias": {favoured: 100.0}}, response={"return_token_ids": True})
    assert list(biased.choices[0].token_ids) == [favoured] * 12
    only = complete({"allowed_token_ids": [favoured]}, response={"return_token_ids": True})
    assert list(only.choices[0].token_ids) == [favoured] * 12
