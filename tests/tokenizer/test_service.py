"""Every RPC over a real server: answers, limits, refusals, and what a hostile input must not do."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from nanoinfer.v1 import generation_pb2, tokenizer_pb2_grpc
from nanoinfer.v1 import tokenizer_pb2 as pb
from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError, StartError, from_rpc_error
from nanoinfer_common.fingerprint import tokenizer_fingerprint
from nanoinfer_common.server import running
from nanoinfer_gateway.core.vocabulary import Vocabulary
from nanoinfer_gateway.upstreams.routing import Tokenizer as GatewaysTokenizer
from nanoinfer_gateway.upstreams.tokenizers import Tokenizers
from nanoinfer_tokenizer.loading import LoadedTokenizer, load_tokenizer
from nanoinfer_tokenizer.service import TokenizerService
from nanoinfer_tokenizer.settings import TokenizerSettings
from nanoinfer_tokenizer.streaming import StreamDecoder
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from tests.tokenizer.serving import eventually

Code = grpc.StatusCode
MAX_CPU_SECONDS = 4.0  # of all threads, for 500,000 characters; measured: 1 to 2


class Served:
    """A running service, its stub and channel."""

    def __init__(self, service: TokenizerService, channel: grpc.aio.Channel, address: str) -> None:
        self.service = service
        self.address = address
        self.channel = channel
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self.registry: CollectorRegistry = service.registry


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(directory_of: Callable[[str], Path]) -> AsyncIterator[Serve]:
    """Starts services: `await serve("qwen2", max_characters=100)`."""
    async with AsyncExitStack() as stack:

        async def start(model: str | Path, **options: Any) -> Served:
            path = directory_of(model) if isinstance(model, str) else model
            settings = TokenizerSettings(
                model=path, port=0, metrics_port=None, num_template_workers=1, **options
            )
            made: list[TokenizerService] = []

            def factory(status: Any) -> TokenizerService:
                made.append(TokenizerService(settings, status))
                return made[0]

            server = await stack.enter_async_context(running(factory, settings))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            return Served(made[0], channel, server.address)

        yield start


async def refused(call: Awaitable[Any]) -> ServiceError:
    """Gives the error that `call` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert caught.value.trailing_metadata() is not None
    return error


def fields(error: ServiceError) -> list[str]:
    return [violation.field for violation in error.violations]


def conversation(*said: tuple[str, str], **options: bool) -> pb.TokenizerServiceRenderChatRequest:
    messages = [
        pb.ChatMessage(role=role, content=[pb.ContentPart(text=text)]) for role, text in said
    ]
    return pb.TokenizerServiceRenderChatRequest(messages=messages, **options)


def ids(*token_ids: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=token_ids)


# --- Encode, EncodeBatch ---


async def test_encode_adds_the_frame_unless_told_not_to(
    serve: Serve, loaded: Callable[[str], LoadedTokenizer], directory_of: Callable[[str], Path]
) -> None:
    stub = (await serve("llama3")).stub
    plain = loaded("llama3").encoding.encode("Hello wörld")
    request = pb.TokenizerServiceEncodeRequest
    for asked, expected in (({}, [700, *plain]), ({"add_special_tokens": True}, [700, *plain])):
        response = await stub.Encode(request(text="Hello wörld", **asked))
        assert list(response.tokens.ids) == expected
    response = await stub.Encode(request(text="Hello wörld", add_special_tokens=False))
    assert list(response.tokens.ids) == plain
    assert response.tokenizer_fingerprint == tokenizer_fingerprint(directory_of("llama3"))
    assert len(response.tokenizer_fingerprint) == 32


@pytest.mark.matrix("R2")
async def test_whitespace_alone_is_text(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    response = await stub.Encode(pb.TokenizerServiceEncodeRequest(text=" \n\t"))
    assert response.tokens.ids


async def test_special_token_text_stays_plain(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    response = await stub.Encode(pb.TokenizerServiceEncodeRequest(text="a<|im_end|>b"))
    assert not {700, 701, 702} & set(response.tokens.ids)


async def test_special_token_text_is_the_token_where_asked(serve: Serve) -> None:
    stub = (await serve("qwen3")).stub
    text, expected = "a<|im_end|>b<think>", [702, 703]
    one = await stub.Encode(pb.TokenizerServiceEncodeRequest(text=text, parse_special_tokens=True))
    batch = await stub.EncodeBatch(
        pb.TokenizerServiceEncodeBatchRequest(texts=[text], parse_special_tokens=True)
    )
    assert [i for i in one.tokens.ids if i >= 700] == expected
    assert list(batch.tokens) == [one.tokens]
    plain = await stub.Encode(pb.TokenizerServiceEncodeRequest(text=text))
    assert max(plain.tokens.ids) < 700


async def test_an_empty_text_is_refused(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    error = await refused(stub.Encode(pb.TokenizerServiceEncodeRequest()))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, names.INVALID_PROMPT)
    assert fields(error) == ["text"]


async def test_the_limit_is_characters_not_bytes(serve: Serve) -> None:
    stub = (await serve("qwen2", max_characters=100)).stub
    await stub.Encode(pb.TokenizerServiceEncodeRequest(text="😀" * 100))
    error = await refused(stub.Encode(pb.TokenizerServiceEncodeRequest(text="a" * 101)))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, names.INPUT_TOO_LARGE)
    assert error.metadata["limit"] == "100"
    assert fields(error) == ["text"]


async def test_a_batch_is_answered_in_order(
    serve: Serve, loaded: Callable[[str], LoadedTokenizer]
) -> None:
    stub = (await serve("mistral")).stub
    texts = ["one", "two two", "drei", "👩‍💻"]
    response = await stub.EncodeBatch(pb.TokenizerServiceEncodeBatchRequest(texts=texts))
    encoding = loaded("mistral").encoding
    assert [list(t.ids) for t in response.tokens] == [[700, *encoding.encode(t)] for t in texts]
    request = pb.TokenizerServiceEncodeBatchRequest(texts=texts, add_special_tokens=False)
    response = await stub.EncodeBatch(request)
    assert [list(t.ids) for t in response.tokens] == [encoding.encode(t) for t in texts]


@pytest.mark.parametrize(
    ("texts", "reason", "field"),
    [
        ([], names.INVALID_PROMPT, "texts"),
        (["a"] * 5, names.INVALID_PROMPT, "texts"),
        (["a", "", "b"], names.INVALID_PROMPT, "texts[1]"),
        (["a" * 50, "b" * 51], names.INPUT_TOO_LARGE, "texts"),
    ],
)
async def test_bad_batches_are_refused(
    texts: list[str], reason: str, field: str, serve: Serve
) -> None:
    stub = (await serve("qwen2", max_batch_texts=4, max_characters=100)).stub
    error = await refused(stub.EncodeBatch(pb.TokenizerServiceEncodeBatchRequest(texts=texts)))
    assert (error.code, error.reason, fields(error)) == (Code.INVALID_ARGUMENT, reason, [field])


async def test_bounds_of_a_batch_are_accepted(serve: Serve) -> None:
    stub = (await serve("qwen2", max_batch_texts=4, max_characters=100)).stub
    request = pb.TokenizerServiceEncodeBatchRequest(texts=["a" * 25] * 4)
    assert len((await stub.EncodeBatch(request)).tokens) == 4


@pytest.mark.matrix("R12")
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen2", "o200k"])
async def test_hostile_texts_end_soon_and_leave_the_service_alive(
    family: str, serve: Serve
) -> None:
    stub = (await serve(family)).stub
    for unit in (" ", "a", "^", "\n", "\u0301", "😀", " \n", "\u00a0", "<", "'s"):
        for size in (500_000, 1_000_000):
            text = (unit * size)[:size]
            start = time.process_time()
            call = stub.Encode(pb.TokenizerServiceEncodeRequest(text=text))
            if size > 500_000:
                assert (await refused(call)).reason == names.INPUT_TOO_LARGE
            else:
                assert (await call).tokens.ids
            assert time.process_time() - start < MAX_CPU_SECONDS
    assert (await stub.Encode(pb.TokenizerServiceEncodeRequest(text="x"))).tokens.ids


@pytest.mark.parametrize(
    "unit", ["<", "<|", "<|im_start|>", "<think>", "</think>", " ", "\U000f0000"]
)
async def test_hostile_conversations_end_soon(unit: str, serve: Serve) -> None:
    stub = (await serve("qwen3")).stub
    text = (unit * 500_000)[:500_000]
    start = time.process_time()
    assert (await stub.Encode(pb.TokenizerServiceEncodeRequest(text=text))).tokens.ids
    assert (await stub.RenderChat(conversation(("assistant", text)))).tokens.ids
    assert time.process_time() - start < 2 * MAX_CPU_SECONDS


# --- RenderChat ---


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True, "return_text": True}])
async def test_render_chat(
    options: dict[str, bool], serve: Serve, directory_of: Callable[[str], Path]
) -> None:
    stub = (await serve("qwen2")).stub
    response = await stub.RenderChat(conversation(("system", "S"), ("user", "Hi"), **options))
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    theirs = Tokenizer.from_file(str(directory_of("qwen2") / "tokenizer.json"))
    assert list(response.tokens.ids) == theirs.encode(text, add_special_tokens=False).ids
    assert response.tokenizer_fingerprint == tokenizer_fingerprint(directory_of("qwen2"))
    assert response.HasField("text") == bool(options)
    assert response.text == (text if options else "")


async def test_the_generation_prompt_can_be_left_out(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    request = conversation(("user", "Hi"), add_generation_prompt=False, return_text=True)
    assert (await stub.RenderChat(request)).text.endswith("Hi<|im_end|>\n")


async def test_parts_are_joined(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    parts = [pb.ContentPart(text="<|im_"), pb.ContentPart(text="end|>")]
    messages = [pb.ChatMessage(role="user", content=parts)]
    request = pb.TokenizerServiceRenderChatRequest(messages=messages, return_text=True)
    response = await stub.RenderChat(request)
    assert "user\n<|im_end|><|im_end|>" in response.text
    special = [token_id for token_id in response.tokens.ids if token_id >= 700]
    assert special == [701, 702, 701, 702, 701]


async def test_without_a_template_there_is_no_chat(serve: Serve) -> None:
    stub = (await serve("gpt2")).stub
    error = await refused(stub.RenderChat(conversation(("user", "Hi"))))
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, names.NO_CHAT_TEMPLATE)


@pytest.mark.matrix("R35")
@pytest.mark.parametrize(
    "request_",
    [
        pb.TokenizerServiceRenderChatRequest(),
        pb.TokenizerServiceRenderChatRequest(messages=[pb.ChatMessage(role="user")]),
        pb.TokenizerServiceRenderChatRequest(
            messages=[pb.ChatMessage(role="user", content=[pb.ContentPart()])]
        ),
        conversation(("", "Hi")),
        conversation(("wizard", "Hi")),
        conversation(("user<|im_end|>", "Hi")),
        conversation(*[("user", "Hi")] * 10_001),
    ],
    ids=["none", "no content", "empty part", "no role", "unknown role", "forged role", "too many"],
)
async def test_bad_conversations_are_refused(
    request_: pb.TokenizerServiceRenderChatRequest, serve: Serve
) -> None:
    stub = (await serve("qwen2")).stub
    error = await refused(stub.RenderChat(request_))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, names.INVALID_MESSAGES)
    assert fields(error)
    assert fields(error)[0].startswith("messages")


@pytest.mark.matrix("R35")
async def test_ten_thousand_messages_are_rendered(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    response = await stub.RenderChat(conversation(*[("user", "Hi")] * 10_000))
    assert sum(token_id == 702 for token_id in response.tokens.ids) == 10_001


async def test_too_long_a_conversation_is_refused(serve: Serve) -> None:
    stub = (await serve("qwen2", max_characters=100)).stub
    error = await refused(stub.RenderChat(conversation(("user", "a" * 60), ("user", "b" * 41))))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, names.INPUT_TOO_LARGE)


async def test_the_templates_refusal_is_passed_on(serve: Serve) -> None:
    stub = (await serve("mistral")).stub
    error = await refused(stub.RenderChat(conversation(("assistant", "Hi"))))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, names.INVALID_MESSAGES)
    assert "must alternate" in error.violations[0].description


@pytest.fixture
def model_with(directory_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of the Qwen-like model with another chat template."""

    def make(template: str) -> Path:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((directory_of("qwen2") / name).read_bytes())
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


@pytest.mark.matrix("R33")
@pytest.mark.parametrize(
    "slow",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'x' * 100000 }}{% endfor %}",
    ],
)
async def test_a_slow_template_is_stopped_while_others_are_served(
    slow: str, serve: Serve, model_with: Callable[[str], Path]
) -> None:
    template = "{% if messages[0].content == 'go' %}" + slow + "{% endif %}fine"
    stub = (await serve(model_with(template), template_timeout_seconds=1.0)).stub
    renderings = [asyncio.ensure_future(stub.RenderChat(conversation(("user", "go"))))]
    renderings += [asyncio.ensure_future(stub.RenderChat(conversation(("user", "go"))))]
    await asyncio.sleep(0.05)
    await stub.Encode(pb.TokenizerServiceEncodeRequest(text="x"))
    assert "'x'" in slow or not renderings[-1].done()  # its size ends the other one soon
    for rendering in renderings:
        error = await refused(rendering)
        assert (error.code, error.reason) == (Code.INTERNAL, names.TEMPLATE_TIMEOUT)
    request = conversation(("user", "x"), return_text=True)
    assert (await stub.RenderChat(request)).text == "fine"


@pytest.mark.matrix("R34")
async def test_a_template_cannot_reach_into_the_interpreter(
    serve: Serve, model_with: Callable[[str], Path]
) -> None:
    stub = (await serve(model_with("{{ ''.__class__.__mro__[1].__subclasses__() }}"))).stub
    error = await refused(stub.RenderChat(conversation(("user", "x"))))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, names.INVALID_MESSAGES)
    assert "SecurityError" in error.violations[0].description


# --- Decode, DecodeStream ---


async def test_decode_is_the_inverse_of_encode(serve: Serve) -> None:
    stub = (await serve("llama3")).stub
    text = "Zwölf 👩‍👩‍👧 你好\n"
    encoded = await stub.Encode(pb.TokenizerServiceEncodeRequest(text=text))
    decoded = await stub.Decode(pb.TokenizerServiceDecodeRequest(tokens=encoded.tokens))
    assert decoded.text == text
    request = pb.TokenizerServiceDecodeRequest(tokens=encoded.tokens, skip_special_tokens=False)
    assert (await stub.Decode(request)).text == "<|begin_of_text|>" + text


async def test_many_ids_are_decoded_without_holding_others_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("gpt2")
    stub, push, answered = served.stub, StreamDecoder.push, threading.Event()
    pushed: list[int] = []

    def slowly(decoder: StreamDecoder, token_ids: Sequence[int]) -> str:
        pushed.append(len(token_ids))
        if not answered.is_set():
            time.sleep(0.02)
        return push(decoder, token_ids)

    monkeypatch.setattr(StreamDecoder, "push", slowly)
    request = pb.TokenizerServiceDecodeRequest(tokens=ids(*range(256), *[65] * 499_744))
    decoding = asyncio.ensure_future(stub.Decode(request))
    while not pushed:
        await asyncio.sleep(0)
    await stub.GetServerInfo(pb.TokenizerServiceGetServerInfoRequest())
    assert sum(pushed) < 500_000  # not after all of them
    answered.set()
    assert len((await decoding).text) >= 499_744


@pytest.mark.matrix("R28")
async def test_bytes_that_are_no_characters_become_replacements(
    serve: Serve, loaded: Callable[[str], LoadedTokenizer]
) -> None:
    stub = (await serve("gpt2")).stub
    tokens = loaded("gpt2").encoding.vocabulary.spelling.tokens
    request = pb.TokenizerServiceDecodeRequest(
        tokens=ids(tokens.index(b"a"), tokens.index(b"\xf0"), tokens.index(b"b"))
    )
    assert (await stub.Decode(request)).text == "a\ufffdb"


@pytest.mark.matrix("R28")
@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (None, names.INVALID_TOKEN_IDS),
        (ids(), names.INVALID_TOKEN_IDS),
        (ids(1, 703), names.INVALID_TOKEN_IDS),
        (ids(2**32 - 1), names.INVALID_TOKEN_IDS),
        (ids(*[1] * 1001), names.INPUT_TOO_LARGE),
    ],
)
async def test_bad_ids_are_refused(
    tokens: generation_pb2.TokenIds | None, reason: str, serve: Serve
) -> None:
    stub = (await serve("qwen2", max_characters=1000)).stub
    error = await refused(stub.Decode(pb.TokenizerServiceDecodeRequest(tokens=tokens)))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, reason)
    assert fields(error) == ["tokens.ids"]
    requests = iter([pb.TokenizerServiceDecodeStreamRequest(tokens=tokens)])
    error = await refused(stub.DecodeStream(requests).read())
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, reason)


async def test_a_stream_gives_whole_characters(
    serve: Serve, loaded: Callable[[str], LoadedTokenizer]
) -> None:
    served = await serve("gpt2")
    tokens = loaded("gpt2").encoding.vocabulary.spelling.tokens
    data = "aé😀".encode() + b"\xe4\xbd"
    call = served.stub.DecodeStream()
    answers = []
    for byte in data:
        request = pb.TokenizerServiceDecodeStreamRequest(tokens=ids(tokens.index(bytes([byte]))))
        await call.write(request)
        answers.append((await call.read()).text)
        assert served.registry.get_sample_value("nanoinfer_tokenizer_decode_streams") == 1
    assert answers == ["a", "", "é", "", "", "", "😀", "", ""]
    await call.done_writing()
    assert (await call.read()).text == "\ufffd"
    assert await call.read() == grpc.aio.EOF
    assert await call.code() == Code.OK
    assert served.registry.get_sample_value("nanoinfer_tokenizer_decode_streams") == 0


async def test_a_streams_special_tokens_follow_its_first_message(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    Request = pb.TokenizerServiceDecodeStreamRequest
    requests = [Request(tokens=ids(702), skip_special_tokens=False), Request(tokens=ids(702))]
    answers = [answer.text async for answer in stub.DecodeStream(iter(requests))]
    assert answers == ["<|im_end|>", "<|im_end|>"]
    answers = [answer.text async for answer in stub.DecodeStream(iter([Request(tokens=ids(702))]))]
    assert answers == [""]
    changed = stub.DecodeStream(
        iter([Request(tokens=ids(702)), Request(tokens=ids(702), skip_special_tokens=False)])
    )
    await changed.read()
    error = await refused(changed.read())
    assert (error.code, fields(error)) == (Code.INVALID_ARGUMENT, ["skip_special_tokens"])


async def test_an_empty_stream_ends_well(serve: Serve) -> None:
    stub = (await serve("qwen2")).stub
    assert [answer async for answer in stub.DecodeStream(iter([]))] == []


async def test_a_cancelled_stream_leaves_nothing(serve: Serve) -> None:
    served = await serve("qwen2")
    call = served.stub.DecodeStream()
    await call.write(pb.TokenizerServiceDecodeStreamRequest(tokens=ids(1)))
    await call.read()
    call.cancel()
    while served.registry.get_sample_value("nanoinfer_tokenizer_decode_streams"):
        await asyncio.sleep(0.01)
    assert served.registry.get_sample_value("nanoinfer_tokenizer_decode_streams") == 0


# --- GetVocabulary, GetTokenizerInfo, GetServerInfo ---


async def test_the_vocabulary_comes_whole_and_in_order(
    serve: Serve, loaded: Callable[[str], LoadedTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoinfer_tokenizer.service._VOCABULARY_RUN", 100)
    stub = (await serve("llama3")).stub
    tokens: list[bytes] = []
    special: set[int] = set()
    num_runs = 0
    async for run in stub.GetVocabulary(pb.TokenizerServiceGetVocabularyRequest()):
        assert run.first_token_id == len(tokens)
        assert len(run.tokenizer_fingerprint) == 32
        assert run.vocab_size == 705
        assert list(run.eos_token_ids.ids) == [704]
        tokens.extend(run.tokens)
        special.update(run.special_token_ids)
        num_runs += 1
    vocabulary = loaded("llama3").encoding.vocabulary
    assert tuple(tokens) == vocabulary.spelling.tokens
    assert special == set(vocabulary.special)
    assert num_runs == 8


async def test_a_gateway_learns_the_whole_spelling(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoinfer_tokenizer.service._VOCABULARY_RUN", 50)
    pieces = ["<s>", "▁a", "b", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    steps = [
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 2, "stop": 0},
    ]
    document = {
        "version": "1.0",
        "added_tokens": [special_token(0, "<s>")],
        "model": {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)}, "merges": []},
        "decoder": {"type": "Sequence", "decoders": steps},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    served = await serve(tmp_path)
    await served.stub.Decode(pb.TokenizerServiceDecodeRequest(tokens=ids(1)))
    learnt = await learnt_by_a_gateway(served.address)
    spelling = load_tokenizer(tmp_path).encoding.vocabulary.spelling
    assert learnt.spelling == spelling
    assert (len(spelling.byte_ids), spelling.strip_leading_spaces) == (256, 2)
    assert spelling.first_tokens == {1: b"a", 3: b""}
    assert learnt.special_texts == {b"<s>": 0}


async def learnt_by_a_gateway(address: str) -> Vocabulary:
    async def resolve() -> list[str]:
        return [f"ipv4:{address}"]

    replicas = Tokenizers(resolve, 60.0, 60.0, lambda: None, lambda _, is_faulty: None)
    await replicas.start()
    try:
        await eventually(lambda: replicas.any_serving)
        return await GatewaysTokenizer(replicas, 60.0, lambda _: nullcontext()).vocabulary()
    finally:
        await replicas.stop()


def special_token(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": True, **flags}


async def test_the_tokenizers_description(
    serve: Serve, directory_of: Callable[[str], Path]
) -> None:
    stub = (await serve("llama3", max_characters=1234, max_batch_texts=7)).stub
    info = await stub.GetTokenizerInfo(pb.TokenizerServiceGetTokenizerInfoRequest())
    assert info == pb.TokenizerServiceGetTokenizerInfoResponse(
        name="llama3",
        vocab_size=705,
        special_tokens={
            700: "<|begin_of_text|>",
            701: "<|end_of_text|>",
            702: "<|start_header_id|>",
            703: "<|end_header_id|>",
            704: "<|eot_id|>",
        },
        eos_token_ids=[704],
        max_characters=1234,
        max_batch_texts=7,
        tokenizer_fingerprint=tokenizer_fingerprint(directory_of("llama3")),
        has_chat_template=True,
        backend="tiktoken",
    )


async def test_the_servers_description(serve: Serve) -> None:
    stub = (await serve("gpt2")).stub
    server = (await stub.GetServerInfo(pb.TokenizerServiceGetServerInfoRequest())).server
    assert server.service == "nanoinfer-tokenizer"
    assert server.state == generation_pb2.SERVER_STATE_SERVING


# --- faults ---


class Panic(BaseException):
    """Stands for what a panic in native code raises."""


@pytest.mark.matrix("R12")
async def test_a_panic_in_the_encoder_is_answered(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("qwen2")
    encoding = served.service._served.encoding
    encode = encoding.encode

    def panic(text: str, *, continues: bool = False) -> list[int]:
        if text == "boom":
            raise Panic("secret text")
        return encode(text, continues=continues)

    monkeypatch.setattr(encoding, "encode", panic)
    for _ in range(5):  # more than there are threads
        error = await refused(served.stub.Encode(pb.TokenizerServiceEncodeRequest(text="boom")))
        assert (error.code, error.reason) == (Code.INTERNAL, names.INTERNAL)
        assert "secret" not in error.message
    assert (await served.stub.Encode(pb.TokenizerServiceEncodeRequest(text="x"))).tokens.ids
    assert served.registry.get_sample_value("nanoinfer_tokenizer_inflight") == 0


async def test_more_than_the_bound_is_refused_at_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("qwen2", max_pending=3, num_threads=1)
    encoding = served.service._served.encoding
    encode, gate = encoding.encode, threading.Event()

    def slowly(text: str, *, continues: bool = False) -> list[int]:
        assert gate.wait(60)
        return encode(text, continues=continues)

    monkeypatch.setattr(encoding, "encode", slowly)
    request = pb.TokenizerServiceEncodeRequest(text="x")
    calls = [asyncio.ensure_future(served.stub.Encode(request)) for _ in range(8)]
    while sum(call.done() for call in calls) < 5:
        await asyncio.sleep(0.01)
    gate.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    errors = [from_rpc_error(e) for e in answers if isinstance(e, grpc.aio.AioRpcError)]
    assert len(errors) == 5
    for error in errors:
        assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, names.QUEUE_FULL)
        assert error.retry_after
    assert (await served.stub.Encode(request)).tokens.ids


async def test_streams_go_on_while_the_queue_is_full(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("qwen2", max_pending=1, num_threads=1)
    stream = served.stub.DecodeStream()
    gate = threading.Event()
    encoding = served.service._served.encoding
    monkeypatch.setattr(encoding, "encode", lambda text, **_: gate.wait(60) and [1])
    waiting = asyncio.ensure_future(served.stub.Encode(pb.TokenizerServiceEncodeRequest(text="x")))
    while not served.registry.get_sample_value("nanoinfer_tokenizer_inflight"):
        await asyncio.sleep(0.01)
    for _ in range(3):
        await stream.write(pb.TokenizerServiceDecodeStreamRequest(tokens=ids(64)))
        assert (await stream.read()).text
    assert not waiting.done()
    gate.set()
    assert (await waiting).tokens.ids == [1]


async def test_a_cancelled_call_frees_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("qwen2", max_pending=1, num_threads=1)
    encoding, gate = served.service._served.encoding, threading.Event()
    monkeypatch.setattr(encoding, "encode", lambda text, **_: gate.wait(60) and [1])
    request = pb.TokenizerServiceEncodeRequest(text="x")
    call = served.stub.Encode(request)
    while not served.registry.get_sample_value("nanoinfer_tokenizer_inflight"):
        await asyncio.sleep(0.01)
    call.cancel()
    while served.registry.get_sample_value("nanoinfer_tokenizer_inflight"):
        await asyncio.sleep(0.01)  # while the thread is still at it
    again = asyncio.ensure_future(served.stub.Encode(request))
    while not served.registry.get_sample_value("nanoinfer_tokenizer_inflight"):
        await asyncio.sleep(0.01)
    gate.set()
    assert (await again).tokens.ids == [1]


@pytest.mark.matrix("R8", "R11")
@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe", b"\x08\x01", b"\x0a" * 3],
    ids=["random", "truncated", "not UTF-8", "wrong wire type", "garbage"],
)
async def test_malformed_bytes_are_answered_without_a_trace_of_the_inside(
    data: bytes, serve: Serve
) -> None:
    served = await serve("qwen2")
    call: Any = served.channel.unary_unary("/nanoinfer.v1.TokenizerService/Encode")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(data)
    assert caught.value.code() in (Code.UNKNOWN, Code.INTERNAL, Code.INVALID_ARGUMENT)
    assert "Traceback" not in (caught.value.details() or "")
    assert (await served.stub.Encode(pb.TokenizerServiceEncodeRequest(text="x"))).tokens.ids


@pytest.mark.matrix("R11")
async def test_unknown_fields_are_passed_over(serve: Serve) -> None:
    served = await serve("qwen2")
    request = pb.TokenizerServiceEncodeRequest(text="x").SerializeToString() + b"\xf8\x06\x01"
    call: Any = served.channel.unary_unary("/nanoinfer.v1.TokenizerService/Encode")
    response = pb.TokenizerServiceEncodeResponse.FromString(await call(request))
    assert response.tokens.ids


async def test_too_large_a_message_is_refused_by_the_library(serve: Serve) -> None:
    served = await serve("qwen2", max_message_bytes=10_000)
    call = served.stub.Encode(pb.TokenizerServiceEncodeRequest(text="a" * 20_000))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == Code.RESOURCE_EXHAUSTED


# --- measures ---


async def test_metrics_count_what_was_done(serve: Serve) -> None:
    served = await serve("qwen2")
    encoded = await served.stub.Encode(pb.TokenizerServiceEncodeRequest(text="Hello"))
    rendered = await served.stub.RenderChat(conversation(("user", "Hi")))
    value = served.registry.get_sample_value
    total = len(encoded.tokens.ids) + len(rendered.tokens.ids)
    assert value("nanoinfer_tokenizer_encoded_tokens_total") == total
    assert value("nanoinfer_tokenizer_encode_seconds_count") == 2
    assert (value("nanoinfer_tokenizer_queue_seconds_count") or 0) >= 2
    assert value("nanoinfer_tokenizer_inflight") == 0


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Collects spans in memory."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("nanoinfer_common.telemetry.tracer", partial(provider.get_tracer, "test"))
    yield exporter
    provider.shutdown()


async def test_spans_carry_the_prompts_length(serve: Serve, spans: Any) -> None:
    stub = (await serve("qwen2")).stub
    await stub.Encode(pb.TokenizerServiceEncodeRequest(text="Hello"))
    await stub.RenderChat(conversation(("user", "Hi"), ("assistant", "Yes")))
    found = {span.name: span for span in spans.get_finished_spans()}
    encode = found["nanoinfer.v1.TokenizerService/Encode"]
    chat = found["nanoinfer.v1.TokenizerService/RenderChat"]
    render = found["render_prompt"]
    assert encode.attributes["nanoinfer.prompt.chars"] == 5
    assert chat.attributes["nanoinfer.prompt.chars"] == 5
    assert render.attributes["nanoinfer.prompt.chars"] == 5
    assert render.parent.span_id == chat.context.span_id


# --- settings ---


async def test_a_model_without_a_tokenizer_does_not_start(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="neither"):
        await serve(tmp_path)


async def test_the_tokenizer_may_be_elsewhere(
    serve: Serve, directory_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"")
    stub = (await serve(checkpoint, tokenizer=directory_of("qwen3"))).stub
    info = await stub.GetTokenizerInfo(pb.TokenizerServiceGetTokenizerInfoRequest())
    assert info.name == "qwen3"
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(directory_of("qwen3"))


async def test_rank_file_settings_make_another_fingerprint(serve: Serve, tmp_path: Path) -> None:
    import base64

    file = tmp_path / "bytes.tiktoken"
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    file.write_text("\n".join(lines))
    prints = set()
    for options in ({}, {"pattern": "qwen2"}, {"special_tokens": ("<x>",)}):
        stub = (await serve(file, **options)).stub
        info = await stub.GetTokenizerInfo(pb.TokenizerServiceGetTokenizerInfoRequest())
        prints.add(info.tokenizer_fingerprint)
    assert len(prints) == 3
