"""A chat model whose configuration names the base model's end of text, its tokenizer the turn's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from nanoinfer.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    generation_pb2,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)

from tests.e2e.stack import Stack, start_service, start_stack
from tests.engine import tiny_checkpoints
from tests.tokenizer.tiny_tokenizers import make_tokenizer

END_OF_TEXT, END_OF_TURN = 700, 702  # behind 700 tokens of text: qwen2 of `tiny_tokenizers`


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 whose config.json and generation_config.json say `<|endoftext|>`."""
    directory = tmp_path_factory.mktemp("chatml") / "Tiny-2.5-Chat"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_checkpoints._COMMON, "vocab_size", 704)
        patch.setitem(tiny_checkpoints.KINDS, "chatml", tiny_checkpoints._make("Qwen2"))
        patch.setitem(tiny_checkpoints._COMMON, "eos_token_id", END_OF_TEXT)
        tiny_checkpoints.make_checkpoint("chatml", directory)
    make_tokenizer(directory, "qwen2")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(values | {"eos_token_id": END_OF_TEXT}))
    return directory


@pytest.fixture(scope="module")
def stack(chatml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = ["--kv-cache-memory", "4MiB"]
    with start_stack(chatml, tmp_path_factory.mktemp("stack"), engine_flags=flags) as running:
        yield running


def chat_request() -> gateway_pb2.GatewayServiceChatRequest:
    """A turn at whose first token the end of turn is made certain."""
    message = tokenizer_pb2.ChatMessage(
        role="user", content=[tokenizer_pb2.ContentPart(text="the cache")]
    )
    options = gateway_pb2.GenerationOptions(
        sampling=generation_pb2.SamplingParams(temperature=0, logit_bias={END_OF_TURN: 100}),
        stopping=generation_pb2.StoppingParams(max_tokens=8),
    )
    return gateway_pb2.GatewayServiceChatRequest(messages=[message], options=options)


def test_both_services_publish_the_same_ends_and_a_turn_stops_at_its_own(stack: Stack) -> None:
    with grpc.insecure_channel(stack.engine.address) as channel:
        engine = engine_pb2_grpc.EngineServiceStub(channel)
        model = engine.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest(), timeout=10).model
    with grpc.insecure_channel(stack.tokenizer.address) as channel:
        tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        request = tokenizer_pb2.TokenizerServiceGetTokenizerInfoRequest()
        info = tokenizer.GetTokenizerInfo(request, timeout=10)
    assert list(model.eos_token_ids) == list(info.eos_token_ids) == [END_OF_TEXT, END_OF_TURN]
    assert model.id == info.name == "Tiny-2.5-Chat"
    with grpc.insecure_channel(stack.gateway.address) as channel:
        gateway = gateway_pb2_grpc.GatewayServiceStub(channel)
        (choice,) = gateway.Chat(chat_request(), timeout=60).choices
    assert choice.finish.reason == generation_pb2.FINISH_REASON_STOP
    assert choice.finish.stop_match.eos
    assert choice.text == ""


def test_a_tokenizer_beside_other_configurations_is_refused_by_the_gateway(
    stack: Stack, chatml: Path, tmp_path: Path
) -> None:
    """The same tokenizer.json, so the same fingerprint, but another generation_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((chatml / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 701}')
    with start_service("nanoinfer_tokenizer", ["--model", str(tmp_path)], tmp_path) as other:
        upstreams = ["--tokenizer", other.address, "--engine", stack.engine.address]
        with (
            start_service("nanoinfer_gateway", upstreams, tmp_path) as gateway,
            grpc.insecure_channel(gateway.address) as channel,
        ):
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            with pytest.raises(grpc.RpcError) as raised:
                stub.Chat(chat_request(), timeout=60)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "disagree on the ids that end a text" in raised.value.details()
