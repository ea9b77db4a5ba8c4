"""The blocking client against a gateway in this process."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import nanoinfer
import pytest
from nanoinfer import Client, TokenLogprob
from nanoinfer.base import RETRY_POLICY
from nanoinfer.v1 import gateway_pb2, generation_pb2

from tests.client.fake_gateway import (
    CLIENT_TIMEOUT,
    SUMMARY,
    Behaviour,
    finish,
    refusal,
    running_gateway,
)
from tests.waiting import DEADLINES, assert_left

STREAM = gateway_pb2.GatewayServiceGenerateStreamResponse
USER = {"role": "user", "content": "Hi"}


def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    """Words until the client goes away."""
    while context.is_active():
        yield STREAM(deltas=[gateway_pb2.TextDelta(text="word ")])
        time.sleep(0.005)


def test_generate(client: Client) -> None:
    completion = client.generate("x")
    assert completion.text == "Hello, world"
    assert completion.finish_reason == "stop"
    assert completion.choices[0].matched is None
    assert completion.choices[0].seed == 7
    assert completion.usage == nanoinfer.Usage(3, 5, 1, 0)
    assert completion.timings == nanoinfer.Timings(1, 2, 3, 4, 5, 20, 6)
    assert completion.prompt_tokens == 3
    assert completion.model == "fake"
    assert completion.request_id == "from-server"
    assert completion.trace_id == "ab" * 16
    assert completion.tokenizer_fingerprint == b"\x01" * 32
    with pytest.raises(AttributeError):
        completion.model = "other"  # type: ignore[misc]


def test_choices_logprobs_and_matches(client: Client, behaviour: Behaviour) -> None:
    top = generation_pb2.TopLogprob(token_id=4, token=b"\xff", logprob=-0.25, rank=1)
    entry = generation_pb2.TokenLogprob(token_id=5, token=b"a", logprob=-0.5, rank=2, top=[top])
    length = generation_pb2.FINISH_REASON_LENGTH
    matches = [
        finish(0, match=generation_pb2.StopMatch(stop="END")),
        finish(1, match=generation_pb2.StopMatch(token_id=0)),
        finish(2, length, generation_pb2.StopMatch(), seed=2**64 - 1),
    ]
    choices = [
        gateway_pb2.Choice(index=i, text=f"t{i}", token_ids=[5], logprobs=[entry], finish=match)
        for i, match in enumerate(matches)
    ]
    prompt = generation_pb2.PromptInfo(prompt_tokens=2, prompt_logprobs=[entry])
    behaviour.unary = lambda request, context: gateway_pb2.GatewayServiceGenerateResponse(
        choices=choices, prompt_info=prompt, summary=SUMMARY
    )
    completion = client.generate("x", n=3, logprobs=1)
    decoded = TokenLogprob(5, b"a", -0.5, 2, (TokenLogprob(4, b"\xff", -0.25, 1),))
    assert [choice.matched for choice in completion.choices] == ["END", 0, None]
    assert [choice.finish_reason for choice in completion.choices] == ["stop", "stop", "length"]
    assert completion.choices[2].seed == 2**64 - 1
    assert completion.choices[0].token_ids == (5,)
    assert completion.choices[1].logprobs == (decoded,)
    assert completion.prompt_logprobs == (decoded,)


def test_stream(client: Client, behaviour: Behaviour) -> None:
    stream = client.stream("x", temperature=0.0)
    deltas = list(stream)
    assert [delta.text for delta in deltas] == ["Hello", ", ", "world", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]
    assert stream.text == "Hello, world"
    assert stream.result() == client.generate("x")
    assert behaviour.arrivals[0].method == "GenerateStream"
    assert behaviour.arrivals[0].request.options.sampling.HasField("temperature")


def test_stream_of_a_conversation_and_of_ids(client: Client, behaviour: Behaviour) -> None:
    assert client.stream([USER], max_tokens=4).result().text == "Hello, world"
    assert behaviour.arrivals[-1].method == "ChatStream"
    assert behaviour.arrivals[-1].request.messages[0].content[0].text == "Hi"
    assert behaviour.arrivals[-1].request.options.stopping.max_tokens == 4
    assert client.stream([1, 2]).result().text == "Hello, world"
    assert list(behaviour.arrivals[-1].request.token_ids.ids) == [1, 2]


def test_several_completions_in_one_stream(client: Client, behaviour: Behaviour) -> None:
    def two(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield STREAM(
            deltas=[
                gateway_pb2.TextDelta(index=1, text="b", token_ids=[2]),
                gateway_pb2.TextDelta(index=0, text="a", token_ids=[1]),
            ]
        )
        yield STREAM(deltas=[gateway_pb2.TextDelta(index=1, text="B")], finishes=[finish(1)])
        yield STREAM(finishes=[finish(0)], summary=SUMMARY)

    behaviour.stream = two
    stream = client.stream("x", n=2)
    assert [(delta.index, delta.text) for delta in stream] == [
        (1, "b"),
        (0, "a"),
        (1, "B"),
        (1, ""),
        (0, ""),
    ]
    assert [choice.text for choice in stream.result().choices] == ["a", "bB"]
    assert [choice.token_ids for choice in stream.result().choices] == [(1,), (2,)]


@pytest.mark.parametrize("way", ["close", "with", "break", "delete"])
def test_leaving_a_stream_cancels_upstream(client: Client, behaviour: Behaviour, way: str) -> None:
    behaviour.stream = endless
    if way == "close":
        stream = client.stream("x")
        next(stream)
        stream.close()
        assert list(stream) == []
        assert stream.result().text == "word "
        assert stream.result().finish_reason is None
        assert stream.result().usage is None
    elif way == "with":
        with client.stream("x") as inner:
            next(inner)
    elif way == "break":
        for _ in client.stream("x"):
            break
    else:
        forgotten = client.stream("x")
        next(forgotten)
        del forgotten
    gc.collect()
    assert behaviour.cancelled.wait(60)


def test_until_ends_and_cancels(client: Client, behaviour: Behaviour) -> None:
    behaviour.stream = endless
    stream = client.stream("x", until=lambda text: text.count("word") >= 3)
    assert "".join(delta.text for delta in stream) == "word word word "
    assert behaviour.cancelled.wait(60)
    assert stream.result().text == "word word word "
    assert stream.result().finish_reason is None


def test_until_that_raises_cancels_too(client: Client, behaviour: Behaviour) -> None:
    behaviour.stream = endless

    def broken(text: str) -> bool:
        raise LookupError(text)

    with pytest.raises(LookupError, match="word"):
        next(client.stream("x", until=broken))
    assert behaviour.cancelled.wait(60)


def test_closing_from_another_thread_ends_the_iteration(
    client: Client, behaviour: Behaviour
) -> None:
    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield STREAM(deltas=[gateway_pb2.TextDelta(text="a")])
        behaviour.cancelled.wait(60)

    behaviour.stream = silent
    stream = client.stream("x")
    next(stream)
    threading.Timer(0.2, stream.close).start()
    assert list(stream) == []


CODES = [
    (grpc.StatusCode.INVALID_ARGUMENT, nanoinfer.InvalidRequest),
    (grpc.StatusCode.OUT_OF_RANGE, nanoinfer.InvalidRequest),
    (grpc.StatusCode.NOT_FOUND, nanoinfer.NotFound),
    (grpc.StatusCode.UNIMPLEMENTED, nanoinfer.Unsupported),
    (grpc.StatusCode.FAILED_PRECONDITION, nanoinfer.PreconditionFailed),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, nanoinfer.Overloaded),
    (grpc.StatusCode.UNAVAILABLE, nanoinfer.Unavailable),
    (grpc.StatusCode.DEADLINE_EXCEEDED, nanoinfer.DeadlineExceeded),
    (grpc.StatusCode.CANCELLED, nanoinfer.Cancelled),
    (grpc.StatusCode.UNAUTHENTICATED, nanoinfer.PermissionDenied),
    (grpc.StatusCode.PERMISSION_DENIED, nanoinfer.PermissionDenied),
    (grpc.StatusCode.INTERNAL, nanoinfer.ServerError),
    (grpc.StatusCode.DATA_LOSS, nanoinfer.ServerError),
]


@pytest.mark.parametrize(("code", "kind"), CODES)
def test_every_status_has_its_exception(
    client: Client, behaviour: Behaviour, code: grpc.StatusCode, kind: type
) -> None:
    status = refusal(code, "SOME_REASON", "what happened", metadata={"maxModelLen": "8"})

    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort_with_status(status)

    behaviour.unary = refuse
    with pytest.raises(nanoinfer.NanoInferError) as caught:
        client.generate("x", request_id="mine")
    error = caught.value
    assert type(error) is kind
    assert error.code is code
    assert error.reason == "SOME_REASON"
    assert error.message == "what happened"
    assert error.metadata == {"maxModelLen": "8"}
    assert error.request_id == "mine"
    assert error.trace_id == "ab" * 16
    assert str(error) == f"{code.name} (SOME_REASON): what happened"


def test_details(client: Client, behaviour: Behaviour) -> None:
    invalid = refusal(
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SAMPLING_PARAMS", "bad",
        violations=[("sampling.top_p", "must be above 0"), ("sampling.n", "at least 1")],
    )  # fmt: skip
    full = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=1.25)

    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort_with_status(full if request.text == "full" else invalid)

    behaviour.unary = refuse
    with pytest.raises(nanoinfer.InvalidRequest) as caught:
        client.generate("x")
    assert [v.field for v in caught.value.violations] == ["sampling.top_p", "sampling.n"]
    assert caught.value.violations[0].description == "must be above 0"
    assert caught.value.retry_after is None
    with pytest.raises(nanoinfer.Overloaded) as overloaded:
        client.generate("full")
    assert overloaded.value.retry_after == 1.25


def test_details_that_do_not_parse_are_left_out(client: Client, behaviour: Behaviour) -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.INTERNAL, "plain")

    behaviour.unary = refuse
    with pytest.raises(nanoinfer.ServerError, match="plain") as caught:
        client.generate("x")
    assert caught.value.reason is None


def test_a_stream_that_breaks_keeps_what_was_delivered(
    client: Client, behaviour: Behaviour
) -> None:
    def breaks(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for _ in range(100):
            yield STREAM(deltas=[gateway_pb2.TextDelta(text="a")])
        context.abort_with_status(
            refusal(grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST_MID_STREAM", "lost")
        )

    behaviour.stream = breaks
    stream = client.stream("x")
    seen: list[str] = []
    with pytest.raises(nanoinfer.Unavailable) as caught:
        seen.extend(delta.text for delta in stream)
    assert caught.value.reason == "ENGINE_LOST_MID_STREAM"
    assert caught.value.partial is not None
    assert caught.value.partial.text == "a" * 100
    assert stream.text == "a" * 100
    assert list(stream) == []
    with pytest.raises(nanoinfer.Unavailable):
        stream.result()


def test_unavailable_is_retried_before_the_first_message(
    client: Client, behaviour: Behaviour
) -> None:
    attempts = []

    def twice(request: Any, context: grpc.ServicerContext) -> Any:
        attempts.append(dict(context.invocation_metadata()))
        if len(attempts) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return gateway_pb2.GatewayServiceGenerateResponse(summary=SUMMARY)

    behaviour.unary = twice
    client.generate("x")
    assert [each.get("grpc-previous-rpc-attempts") for each in attempts] == [None, "1", "2"]
    assert len({each["x-request-id"] for each in attempts}) == 1


async def test_calls_that_are_refused_together_are_all_retried(
    target: str, behaviour: Behaviour
) -> None:
    def once(request: Any, context: grpc.ServicerContext) -> Any:
        if "grpc-previous-rpc-attempts" not in dict(context.invocation_metadata()):
            context.abort(grpc.StatusCode.UNAVAILABLE, "shutting down")
        return gateway_pb2.GatewayServiceGenerateResponse(summary=SUMMARY)

    behaviour.unary = once
    async with nanoinfer.AsyncClient(target) as client:
        await asyncio.gather(*(client.generate("x") for _ in range(64)))
    assert len(behaviour.arrivals) == 2 * 64


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL])
def test_other_codes_are_not_retried(
    client: Client, behaviour: Behaviour, code: grpc.StatusCode
) -> None:
    behaviour.unary = lambda request, context: context.abort(code, "no")
    with pytest.raises(nanoinfer.NanoInferError):
        client.generate("x")
    assert len(behaviour.arrivals) == 1


def test_timeouts(client: Client, behaviour: Behaviour) -> None:
    for given, allowed in (({}, CLIENT_TIMEOUT), ({"timeout": 5.0}, 5.0)):
        began = time.monotonic()
        client.generate("x", **given)
        assert_left(behaviour.arrivals[-1].seconds_left, allowed, time.monotonic() - began)
    behaviour.stream = endless
    for seconds in DEADLINES:
        with pytest.raises(nanoinfer.DeadlineExceeded) as caught:
            list(client.stream("x", timeout=seconds))
        assert caught.value.partial is not None
        if caught.value.partial.text:
            break
    assert caught.value.partial.text.startswith("word ")


def test_no_server() -> None:
    with Client("127.0.0.1:1", wait_for_ready=False) as client:
        with pytest.raises(nanoinfer.Unavailable):
            client.generate("x")
        with pytest.raises(nanoinfer.Unavailable, match=r"not ready within 0\.3 s") as caught:
            client.wait_until_ready(0.3)
        assert caught.value.reason == "NOT_READY"
    with Client("127.0.0.1:1") as waiting, pytest.raises(nanoinfer.DeadlineExceeded):
        waiting.generate("x", timeout=0.3)


def test_wait_until_ready(behaviour: Behaviour) -> None:
    with running_gateway(behaviour, serving=False) as (address, checks), Client(address) as client:
        with pytest.raises(nanoinfer.Unavailable, match="NOT_SERVING"):
            client.wait_until_ready(0.4)
        told: list[bool] = []

        def become_ready() -> None:
            told.append(True)
            checks.set("readiness", 1)

        threading.Timer(0.3, become_ready).start()
        client.wait_until_ready(60)
        assert told  # not before


def test_a_gateway_without_upstreams_says_what_it_lacks(behaviour: Behaviour) -> None:
    status = refusal(grpc.StatusCode.UNAVAILABLE, "NO_ENGINE", "no engine answers")

    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort_with_status(status)

    behaviour.unary = refuse
    with (
        running_gateway(behaviour, serving=False) as (address, _),
        Client(address) as client,
        pytest.raises(nanoinfer.Unavailable) as caught,
    ):
        client.generate("x", timeout=60)
    assert caught.value.reason == "NO_ENGINE"
    assert len(behaviour.arrivals) == RETRY_POLICY["maxAttempts"]


def test_batch_keeps_order_and_its_limit(client: Client, behaviour: Behaviour) -> None:
    lock, running, peak = threading.Lock(), [0], [0]

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        time.sleep(0.1 if request.text == "p0" else 0.02)
        with lock:
            running[0] -= 1
        choice = gateway_pb2.Choice(text=request.text.upper(), finish=finish())
        return gateway_pb2.GatewayServiceGenerateResponse(choices=[choice], summary=SUMMARY)

    behaviour.unary = slow
    prompts = [f"p{number}" for number in range(12)]
    completions = client.generate_batch(iter(prompts), max_concurrency=4, max_tokens=3)
    assert [completion.text for completion in completions] == [p.upper() for p in prompts]
    assert peak[0] == 4
    assert all(a.request.options.stopping.max_tokens == 3 for a in behaviour.arrivals)
    assert client.generate_batch([]) == []
    with pytest.raises(ValueError, match="max_concurrency"):
        client.generate_batch(["a"], max_concurrency=0)


def test_the_first_failure_of_a_batch_ends_it(client: Client, behaviour: Behaviour) -> None:
    def fails(request: Any, context: grpc.ServicerContext) -> Any:
        if request.text == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad one")
        return gateway_pb2.GatewayServiceGenerateResponse(summary=SUMMARY)

    behaviour.unary = fails
    with pytest.raises(nanoinfer.InvalidRequest, match="bad one"):
        client.generate_batch(["a", "bad", *["b"] * 50], max_concurrency=1)
    assert len(behaviour.arrivals) <= 3


def test_the_rest(client: Client, behaviour: Behaviour) -> None:
    assert client.count_tokens("text", model="m") == 11
    assert behaviour.arrivals[-1].request.text == "text"
    assert behaviour.arrivals[-1].request.model == "m"
    assert client.count_tokens([USER], priority=3) == 11
    assert behaviour.arrivals[-1].request.conversation.messages[0].role == "user"
    assert behaviour.arrivals[-1].metadata["x-nanoinfer-priority"] == "3"
    assert [model.id for model in client.models()] == ["first", "second"]
    assert client.model_info().id == "served"
    assert client.model_info("other").id == "other"
    assert client.server_info().version == "1.2.3"
