"""Whatever a request is refused for, the refusal carries its id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2
from nanoinfer_common.errors import from_rpc_error

from tests.gateway.fakes import FakeEngine, FakeTokenizer, endless, gateway, serving

Options = pb.GenerationOptions


def sampling(**fields: Any) -> Options:
    return Options(sampling=generation_pb2.SamplingParams(**fields))


def response(**fields: Any) -> Options:
    return Options(response=generation_pb2.ResponseOptions(**fields))


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


# what is asked, the settings under which it is refused, and the reason
REFUSALS: dict[str, tuple[str, Options, dict[str, Any]]] = {
    "INVALID_SAMPLING_PARAMS": ("hi", sampling(top_p=7), {}),
    "INVALID_STOPPING_PARAMS": ("hi", Options(stop=[""]), {}),
    "INVALID_RESPONSE_OPTIONS": ("hi", response(logprobs=1000), {}),
    "INVALID_REQUEST": ("hi", Options(cache_salt="x" * 1000), {}),
    "INVALID_PROMPT": ("", Options(), {}),
    "FEATURE_DISABLED": ("hi", response(prompt_logprobs=1), {}),
    "MODEL_NOT_FOUND": ("hi", Options(model="another"), {}),
    "INPUT_TOO_LARGE": ("x" * 100, Options(), {"max_request_prompt_bytes": 50}),
    "ANSWER_TOO_LARGE": ("hi", response(logprobs=20), {"max_answer_bytes": 1024}),
    "DEADLINE_EXCEEDED": ("hi", Options(), {"default_deadline_seconds": 0.2}),
    "QUEUE_FULL": ("hi", Options(), {"max_requests": 1}),
    "QUOTA_EXCEEDED": ("hi", Options(), {"max_tenant_requests": 1}),
    "SHUTTING_DOWN": ("hi", Options(), {}),
}


@pytest.mark.parametrize("place", ["field", "metadata"])
@pytest.mark.parametrize("reason", REFUSALS)
async def test_a_refusal_carries_the_request_id(
    tokenizer: FakeTokenizer, engine: FakeEngine, reason: str, place: str
) -> None:
    text, options, settings = REFUSALS[reason]
    engine.behaviour = endless()
    asked = Options()
    asked.CopyFrom(options)
    asked.stopping.max_tokens = 900
    metadata = (("x-request-id", "mine"),) if place == "metadata" else ()
    if place == "field":
        asked.request_id = "mine"
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], drain_seconds=0, **settings) as running,
    ):
        stub = running.stub
        held = stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi"))
        if reason in ("QUEUE_FULL", "QUOTA_EXCEEDED"):
            await held.read()
        if reason == "SHUTTING_DOWN":
            running.server.status.set_draining()
        calls: list[Callable[[], Any]] = [
            lambda: stub.Generate(
                pb.GatewayServiceGenerateRequest(text=text, options=asked), metadata=metadata
            ),
            lambda: drain(
                stub.GenerateStream(
                    pb.GatewayServiceGenerateStreamRequest(text=text, options=asked),
                    metadata=metadata,
                )
            ),
        ]
        for call in calls[: 1 if reason == "ANSWER_TOO_LARGE" else 2]:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call()
            assert from_rpc_error(raised.value).reason == reason
            assert dict(raised.value.trailing_metadata() or ())["x-request-id"] == "mine"
        held.cancel()


@pytest.mark.matrix("R88")
@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize("service", ["engine", "tokenizer"])
async def test_what_an_upstreams_library_says_stays_inside(
    tokenizer: FakeTokenizer, engine: FakeEngine, service: str, code: grpc.StatusCode
) -> None:
    async def fail(context: Any) -> None:
        await context.abort(code, "/secret/path at 10.0.0.1")

    if service == "tokenizer":
        tokenizer.before = fail
    else:
        engine.before = fail
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], drain_seconds=0) as running,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        assert from_rpc_error(raised.value).reason == "INTERNAL"
        assert "secret" not in f"{raised.value.details()}{raised.value.trailing_metadata()}"


async def test_an_id_that_is_none_is_replaced(tokenizer: FakeTokenizer, engine: FakeEngine) -> None:
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address]) as running,
    ):
        request = pb.GatewayServiceGenerateRequest(text="hi", options=Options(request_id="a\nb"))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(request)
        assert len(dict(raised.value.trailing_metadata() or ())["x-request-id"]) == 36
