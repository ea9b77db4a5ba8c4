"""The eight RPCs over real sockets: what comes back, what is refused, what goes upstream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import gateway_pb2_grpc, generation_pb2, tokenizer_pb2
from nanoinfer_common.server import running as running_service
from nanoinfer_gateway.service import GatewayService
from nanoinfer_gateway.settings import GatewaySettings

from tests.gateway.fakes import (
    BIG,
    FINGERPRINT,
    FakeEngine,
    FakeTokenizer,
    Gateway,
    endless,
    eventually,
    gateway,
    ids_of,
    model_info,
    serving,
    tell,
)
from tests.waiting import DEADLINES, assert_left

HOP_SECONDS = 0.05  # that a hop keeps of the deadline for itself
TOKENIZER_SECONDS = 5  # at most, for one of its calls


def chat(*texts: str) -> list[tokenizer_pb2.ChatMessage]:
    parts = [tokenizer_pb2.ContentPart(text=text) for text in texts]
    return [tokenizer_pb2.ChatMessage(role="user", content=parts)]


def reason(error: grpc.aio.AioRpcError) -> str:
    return str(detail(error, error_details_pb2.ErrorInfo()).reason)


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            packed.Unpack(kind)
            return kind
    raise AssertionError(f"no {kind.DESCRIPTOR.name}")


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def without_times(summary: generation_pb2.GenerationSummary) -> generation_pb2.GenerationSummary:
    result = generation_pb2.GenerationSummary()
    result.CopyFrom(summary)
    result.ClearField("timings")
    result.ClearField("request_id")
    return result


def joined(messages: Iterable[Any], index: int) -> pb.Choice:
    """One choice of a stream, put together by the contract's rules."""
    choice = pb.Choice(index=index)
    for message in messages:
        for delta in message.deltas:
            if delta.index == index:
                choice.text += delta.text
                choice.token_ids.extend(delta.token_ids)
        for finish in message.finishes:
            if finish.index == index:
                choice.finish.CopyFrom(finish)
    return choice


async def test_the_whole_answer_is_the_stream_collected(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.behaviour = tell(ids_of(b"Hello", b" ", "日本".encode(), b"STO"))
    options = pb.GenerationOptions(
        sampling=generation_pb2.SamplingParams(n=3, seed=5),
        response=generation_pb2.ResponseOptions(return_token_ids=True),
    )
    stub = running_gateway.stub
    whole = await stub.Generate(pb.GatewayServiceGenerateRequest(text="hi", options=options))
    request = pb.GatewayServiceGenerateStreamRequest(text="hi", options=options)
    stream = [message async for message in stub.GenerateStream(request)]
    assert [joined(stream, index) for index in range(3)] == list(whole.choices)
    assert whole.choices[2].text == "Hello 日本STO"
    assert stream[0].prompt_info == whole.prompt_info
    assert not any(message.HasField("prompt_info") for message in stream[1:])
    assert not any(message.HasField("summary") for message in stream[:-1])
    assert without_times(stream[-1].summary) == without_times(whole.summary)
    assert whole.summary.usage.completion_tokens == 3 * 7


async def test_chat_renders_and_streams(
    running_gateway: Gateway, tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    stub = running_gateway.stub
    whole = await stub.Chat(pb.GatewayServiceChatRequest(messages=chat("a", "b")))
    stream = [
        message
        async for message in stub.ChatStream(
            pb.GatewayServiceChatStreamRequest(messages=chat("a", "b"))
        )
    ]
    assert whole.choices[0].text == joined(stream, 0).text == "Hello world"
    assert whole.summary.timings.tokenize_ns > 0
    assert [request.messages for request in tokenizer.named("RenderChat")] == [chat("a", "b")] * 2
    assert bytes(engine.requests[0].prompt.ids) == b"user:ab\n"
    assert engine.requests[0].tokenizer_fingerprint == FINGERPRINT
    assert len(tokenizer.named("GetVocabulary")) == 1


async def test_ids_need_no_tokenizer_call(
    running_gateway: Gateway, tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    request = pb.GatewayServiceGenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1, 2]))
    answer = await running_gateway.stub.Generate(request)
    assert answer.choices[0].text == "Hello world"
    assert tokenizer.named("Encode") == []
    assert not engine.requests[0].HasField("tokenizer_fingerprint")


async def test_stop_strings_stay_here_and_end_the_engines_call(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    options = pb.GenerationOptions(stop=["aaa", "zz"])
    answer = await running_gateway.stub.Generate(
        pb.GatewayServiceGenerateRequest(text="hi", options=options)
    )
    assert answer.choices[0].finish.stop_match.stop == "aaa"
    assert answer.choices[0].text == ""
    assert answer.summary.usage.completion_tokens == 3
    await asyncio.wait_for(engine.cancelled.wait(), 60)
    await eventually(lambda: engine.num_running == 0)


async def test_metadata_and_deadline_go_upstream(
    running_gateway: Gateway, tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    metadata = (
        ("x-request-id", "from-metadata"),
        ("x-nanoinfer-priority", "-7"),
        ("x-nanoinfer-tenant", "acme"),
    )
    began = time.monotonic()
    call = running_gateway.stub.Generate(
        pb.GatewayServiceGenerateRequest(text="hi"), metadata=metadata, timeout=60.0
    )
    answer = await call
    spent = time.monotonic() - began
    assert answer.summary.request_id == "from-metadata"
    assert dict(await call.trailing_metadata())["x-request-id"] == "from-metadata"
    _, _, encode_metadata, encode_remaining = tokenizer.calls[-1]
    for sent in (encode_metadata, engine.metadata[0]):
        assert {key: sent[key] for key, _ in metadata} == dict(metadata)
    assert engine.requests[0].request_id == "from-metadata"
    assert_left(encode_remaining, TOKENIZER_SECONDS, spent)
    assert_left(engine.remaining[0], 60 - HOP_SECONDS, spent)


async def test_the_field_goes_before_the_metadatas_request_id(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    request = pb.GatewayServiceGenerateRequest(text="hi")
    request.options.request_id = "field"
    metadata = (("x-request-id", "metadata"),)
    answer = await running_gateway.stub.Generate(request, metadata=metadata)
    assert answer.summary.request_id == engine.requests[0].request_id == "field"
    drawn = await running_gateway.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
    assert len(drawn.summary.request_id) == 36


@pytest.mark.matrix("R47")
async def test_without_a_deadline_the_servers_default_goes_upstream(
    tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], default_deadline_seconds=2) as running,
    ):
        engine.behaviour = endless()
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert_left(engine.remaining[0], 2 - HOP_SECONDS, time.monotonic() - began)
        await asyncio.wait_for(engine.cancelled.wait(), 60)


async def test_a_clients_cancel_reaches_the_engine(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    call = running_gateway.stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi"))
    await call.read()
    call.cancel()
    await asyncio.wait_for(engine.cancelled.wait(), 60)
    await eventually(lambda: engine.num_running == 0, 60)


async def test_a_clients_cancel_ends_a_whole_answer_too(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    call = running_gateway.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
    await eventually(lambda: engine.num_running == 1)
    call.cancel()
    await asyncio.wait_for(engine.cancelled.wait(), 60)


async def test_a_clients_deadline_reaches_the_engine(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    request = pb.GatewayServiceGenerateStreamRequest(text="hi")
    for seconds in DEADLINES:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in running_gateway.stub.GenerateStream(request, timeout=seconds):
                pass
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if engine.requests:
            break
    await asyncio.wait_for(engine.cancelled.wait(), 60)


async def test_a_clients_cancel_reaches_the_tokenizer(
    running_gateway: Gateway, tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    started = asyncio.Event()

    async def hang(context: Any) -> None:
        started.set()
        await asyncio.sleep(600)

    tokenizer.before = hang
    call = running_gateway.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
    await asyncio.wait_for(started.wait(), 60)
    call.cancel()
    await asyncio.wait_for(tokenizer.cancelled.wait(), 60)
    assert engine.requests == []


@pytest.mark.matrix("R48")
async def test_overload_is_answered_at_once_with_retry_info(
    tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    engine.behaviour = endless()
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], max_requests=2) as running,
    ):
        request = pb.GatewayServiceGenerateStreamRequest(text="hi")
        held = [running.stub.GenerateStream(request) for _ in range(2)]
        for call in held:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
        assert not any(call.done() for call in held)  # it waited for none of them
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(raised.value) == "QUEUE_FULL"
        delay = detail(raised.value, error_details_pb2.RetryInfo()).retry_delay
        assert delay.ToMilliseconds() > 0
        assert len(engine.requests) == 2
        for call in held:
            call.cancel()
        await eventually(lambda: engine.num_running == 0)
        engine.behaviour = tell(ids_of(b"Hello"))
        answer = await running.stub.Generate(pb.GatewayServiceGenerateRequest(text="hi"))
        assert answer.choices[0].text == "Hello"


def generate(**more: Any) -> pb.GatewayServiceGenerateRequest:
    return pb.GatewayServiceGenerateRequest(text="hi", options=pb.GenerationOptions(**more))


NAN = float("nan")
BAD: list[tuple[str, Message, grpc.StatusCode, str]] = [
    ("Generate", pb.GatewayServiceGenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    (
        "Generate",
        pb.GatewayServiceGenerateRequest(text=""),
        grpc.StatusCode.INVALID_ARGUMENT,
        "prompt",
    ),
    (
        "Generate",
        pb.GatewayServiceGenerateRequest(token_ids=generation_pb2.TokenIds()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "prompt",
    ),
    (
        "Generate",
        pb.GatewayServiceGenerateRequest(token_ids=generation_pb2.TokenIds(ids=[10**6])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "prompt",
    ),
    ("Chat", pb.GatewayServiceChatRequest(), grpc.StatusCode.INVALID_ARGUMENT, "messages"),
    (
        "Generate",
        generate(sampling=generation_pb2.SamplingParams(temperature=NAN)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "temperature",
    ),
    (
        "Generate",
        generate(sampling=generation_pb2.SamplingParams(n=10**9)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "n",
    ),
    ("Generate", generate(stop=[""]), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    ("Generate", generate(stop=["a"] * 17), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    ("Generate", generate(stop=["a" * 257]), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    ("Generate", generate(request_id="a b"), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
    (
        "CountTokens",
        pb.GatewayServiceCountTokensRequest(),
        grpc.StatusCode.INVALID_ARGUMENT,
        "prompt",
    ),
    (
        "ListModels",
        pb.GatewayServiceListModelsRequest(page_size=-1),
        grpc.StatusCode.INVALID_ARGUMENT,
        "page_size",
    ),
]


@pytest.mark.matrix("R1", "R20")
@pytest.mark.parametrize(("method", "request_message", "code", "field"), BAD)
async def test_bad_input_names_its_field_and_reaches_no_engine(
    running_gateway: Gateway,
    engine: FakeEngine,
    method: str,
    request_message: Message,
    code: grpc.StatusCode,
    field: str,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(running_gateway.stub, method)(request_message)
    assert raised.value.code() is code
    violations = detail(raised.value, error_details_pb2.BadRequest()).field_violations
    assert any(field in violation.field for violation in violations)
    assert engine.requests == []


async def test_too_long_prompts_are_refused_before_they_travel(
    tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], max_request_prompt_bytes=5) as running,
    ):
        for call in (
            running.stub.Generate(pb.GatewayServiceGenerateRequest(text="ééé")),
            running.stub.Chat(pb.GatewayServiceChatRequest(messages=chat("ab"))),
            running.stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="123456")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason(raised.value) == "INPUT_TOO_LARGE"
        ids = generation_pb2.TokenIds(ids=[1] * 1000)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(pb.GatewayServiceGenerateRequest(token_ids=ids))
        assert reason(raised.value) == "PROMPT_TOO_LONG"
    assert [name for name, *_ in tokenizer.calls] == ["GetVocabulary"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        (
            pb.GenerationOptions(sampling=generation_pb2.SamplingParams(frequency_penalty=1)),
            "FEATURE_PENALTIES",
        ),
        (
            pb.GenerationOptions(structured_output=generation_pb2.StructuredOutput(regex="a")),
            "FEATURE_STRUCTURED_OUTPUT",
        ),
    ],
)
async def test_what_is_not_there_is_refused_not_ignored(
    running_gateway: Gateway, options: pb.GenerationOptions, feature: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await running_gateway.stub.Generate(
            pb.GatewayServiceGenerateRequest(text="hi", options=options)
        )
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert detail(raised.value, error_details_pb2.ErrorInfo()).metadata["feature"] == feature


async def test_a_prompt_that_is_too_long_is_cut_where_asked(
    running_gateway: Gateway, engine: FakeEngine
) -> None:
    stub = running_gateway.stub
    most = engine.model.max_model_len - 1
    ids = generation_pb2.TokenIds(ids=[5] * 2000 + [6])
    for prompt in ({"token_ids": ids}, {"text": "a" * 2000 + "b"}):
        cut = pb.GatewayServiceGenerateRequest(
            options=pb.GenerationOptions(truncate_prompt_tokens=most), **prompt
        )
        answer = await stub.Generate(cut)
        assert answer.prompt_info.prompt_tokens == most
        sent = engine.requests[-1].prompt.ids
        assert len(sent) == most
        assert sent[-1] in (6, ord("b"))
        for beyond in (0, most + 1):
            cut.options.truncate_prompt_tokens = beyond
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Generate(cut)
            bad = detail(raised.value, error_details_pb2.BadRequest())
            assert [v.field for v in bad.field_violations] == ["truncate_prompt_tokens"]


@pytest.mark.matrix("R37")
async def test_unknown_models_are_not_found(running_gateway: Gateway) -> None:
    stub = running_gateway.stub
    for call in (
        stub.Generate(generate(model="other")),
        stub.GetModelInfo(pb.GatewayServiceGetModelInfoRequest(model="other")),
        stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="a", model="other")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert reason(raised.value) == "MODEL_NOT_FOUND"
    answer = await stub.Generate(generate(model="fake"))
    assert answer.summary.model == "fake"


async def test_tokens_are_counted(running_gateway: Gateway, engine: FakeEngine) -> None:
    stub = running_gateway.stub
    text = await stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="héllo"))
    assert text.num_tokens == 6
    conversation = pb.Conversation(messages=chat("ab"))
    counted = await stub.CountTokens(
        pb.GatewayServiceCountTokensRequest(conversation=conversation, model="fake")
    )
    assert counted.num_tokens == len("user:ab\n")
    assert engine.requests == []


async def test_special_tokens_in_text_are_parsed_only_where_asked(
    running_gateway: Gateway, tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    stub = running_gateway.stub
    for asked in ({}, {"parse_special_tokens": False}, {"parse_special_tokens": True}):
        await stub.Generate(pb.GatewayServiceGenerateRequest(text="hi", **asked))
        await drain(stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi", **asked)))
        await stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="hi", **asked))
    parsed = [request.parse_special_tokens for request in tokenizer.named("Encode")]
    assert parsed == [False] * 6 + [True] * 3
    given = generation_pb2.TokenIds(ids=[1])
    conversation = pb.Conversation(messages=chat("a"))
    for call in (
        stub.Generate(pb.GatewayServiceGenerateRequest(token_ids=given, parse_special_tokens=True)),
        drain(
            stub.GenerateStream(
                pb.GatewayServiceGenerateStreamRequest(token_ids=given, parse_special_tokens=True)
            )
        ),
        stub.CountTokens(
            pb.GatewayServiceCountTokensRequest(
                conversation=conversation, parse_special_tokens=True
            )
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "parse_special_tokens" in caught.value.details()


async def test_models_and_server_are_described(running_gateway: Gateway) -> None:
    stub = running_gateway.stub
    expected = model_info()
    expected.features.extend([generation_pb2.FEATURE_ECHO, generation_pb2.FEATURE_TRUNCATE_PROMPT])
    info = await stub.GetModelInfo(pb.GatewayServiceGetModelInfoRequest())
    assert info.model == expected
    listed = await stub.ListModels(pb.GatewayServiceListModelsRequest())
    assert list(listed.models) == [expected]
    assert listed.next_page_token == ""
    server = (await stub.GetServerInfo(pb.GatewayServiceGetServerInfoRequest())).server
    assert server.service == "nanoinfer-gateway"
    assert server.state == generation_pb2.SERVER_STATE_SERVING


async def test_several_models_are_a_union_and_must_be_named(tokenizer: FakeTokenizer) -> None:
    first, second = FakeEngine(model=model_info("b")), FakeEngine(model=model_info("a"))
    async with (
        serving(tokenizer) as one,
        serving(first) as two,
        serving(second) as three,
        gateway([one.address], [two.address, three.address]) as running,
    ):
        request = pb.GatewayServiceListModelsRequest(page_size=1)
        await eventually(lambda: bool(first.model.id and second.model.id))
        async with asyncio.timeout(60):
            while not (page := await running.stub.ListModels(request)).next_page_token:
                await asyncio.sleep(0.01)
        request.page_token = page.next_page_token
        rest = await running.stub.ListModels(request)
        assert [page.models[0].id, rest.models[0].id] == ["a", "b"]
        assert rest.next_page_token == ""
        await running.stub.Generate(generate(model="b"))
        assert (len(first.requests), len(second.requests)) == (1, 0)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(generate())
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def health_of(running: Gateway, name: str) -> str:
    stub = health_pb2_grpc.HealthStub(running.channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


async def until_health(running: Gateway, name: str, expected: str) -> None:
    async with asyncio.timeout(60):
        while await health_of(running, name) != expected:
            await asyncio.sleep(0.01)


@pytest.mark.matrix("R57")
async def test_readiness_follows_the_engines(tokenizer: FakeTokenizer, engine: FakeEngine) -> None:
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address]) as running,
    ):
        assert await health_of(running, "readiness") == "SERVING"
        await two.kill()
        await until_health(running, "readiness", "NOT_SERVING")
        assert await health_of(running, "liveness") == "SERVING"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(generate())
        assert reason(raised.value) == "NO_ENGINE"
        assert detail(raised.value, error_details_pb2.RetryInfo()).retry_delay.seconds == 1
        async with serving(engine, two.address):
            await until_health(running, "readiness", "SERVING")
            assert (await running.stub.Generate(generate())).choices[0].text == "Hello world"


async def test_without_upstreams_a_request_is_told_what_lacks() -> None:
    nowhere = ["127.0.0.1:1"]
    async with gateway(nowhere, nowhere, ready_without_upstreams=True) as running:
        assert await health_of(running, "readiness") == "SERVING"
        for call, expected in (
            (running.stub.Generate(generate()), "NO_ENGINE"),
            (running.stub.Generate(pb.GatewayServiceGenerateRequest()), "INVALID_PROMPT"),
            (
                running.stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="a")),
                "TOKENIZER_UNAVAILABLE",
            ),
            (running.stub.GetModelInfo(pb.GatewayServiceGetModelInfoRequest()), "NO_ENGINE"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert reason(raised.value) == expected
        listed = await running.stub.ListModels(pb.GatewayServiceListModelsRequest())
        assert list(listed.models) == []


async def test_a_gateway_waits_for_its_upstreams_without_refusing_to_answer() -> None:
    settings = GatewaySettings(
        tokenizer=("127.0.0.1:1",), engine=("127.0.0.1:1",), port=0, metrics_port=None
    )
    async with (
        running_service(partial(GatewayService, settings), settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        running = Gateway(gateway_pb2_grpc.GatewayServiceStub(channel), server, channel)
        assert await health_of(running, "readiness") == "NOT_SERVING"
        assert await health_of(running, "liveness") == "SERVING"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Generate(generate())
        assert reason(raised.value) == "NO_ENGINE"


@pytest.mark.matrix("R61", "R62")
async def test_readiness_follows_the_tokenizers(
    tokenizer: FakeTokenizer, engine: FakeEngine
) -> None:
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address]) as running,
    ):
        engine.behaviour = endless()
        live = running.stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi"))
        await live.read()
        await one.kill()
        await until_health(running, "readiness", "NOT_SERVING")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running.stub.Chat(pb.GatewayServiceChatRequest(messages=chat("a")))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(raised.value) == "TOKENIZER_UNAVAILABLE"
        assert (await live.read()).deltas[0].text.startswith("a")  # a running stream goes on
        engine.behaviour = tell(ids_of(b"Hello"))
        ids = pb.GatewayServiceGenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1]))
        assert (await running.stub.Generate(ids)).choices[0].text == "Hello"
        async with serving(FakeTokenizer(), one.address):
            await until_health(running, "readiness", "SERVING")
            assert (await running.stub.Generate(generate())).choices[0].text == "Hello"
        live.cancel()


async def test_a_reader_that_stalls_is_ended(tokenizer: FakeTokenizer, engine: FakeEngine) -> None:
    engine.behaviour = endless(pause=0, token_id=BIG)
    async with (
        serving(tokenizer) as one,
        serving(engine) as two,
        gateway([one.address], [two.address], stall_seconds=0.3) as running,
    ):
        call = running.stub.GenerateStream(pb.GatewayServiceGenerateStreamRequest(text="hi"))
        await call.read()
        await asyncio.wait_for(engine.cancelled.wait(), 60)
        other = running.stub.CountTokens(pb.GatewayServiceCountTokensRequest(text="abc"))
        assert (await other).num_tokens == 3
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await drain(call)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(raised.value) == "STREAM_STALLED"
