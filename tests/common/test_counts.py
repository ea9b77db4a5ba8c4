"""Counts that the size of a message does not bound: an empty element takes a byte or two.

Every repeated field of every request is refused by its length, before Python looks at an element.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from nanoinfer.v1 import engine_pb2, gateway_pb2, generation_pb2, tokenizer_pb2
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.validation import (
    MAX_CONTENT_PARTS,
    MAX_MESSAGES,
    Limits,
    validate_messages,
    validate_prompt_ids,
    validate_request,
)
from nanoinfer_tokenizer.checks import check_texts, check_token_ids

MANY = 200_000
LIMITS = Limits(vocab_size=1000, max_model_len=1000)
UNKNOWN = Limits()

Options = gateway_pb2.GenerationOptions
EngineRequest = engine_pb2.EngineServiceGenerateRequest


def parts(*counts: int) -> list[tokenizer_pb2.ChatMessage]:
    """Messages of empty parts; as they arrive, because to make them one by one takes long."""
    return [
        tokenizer_pb2.ChatMessage.FromString(b"\x0a\x04user" + b"\x12\x00" * count)
        for count in counts
    ]


def options(**values: Any) -> tuple[Options, EngineRequest]:
    """The same options, as they reach the gateway and the engine."""
    return Options(**values), EngineRequest(**values)


def sampling(**values: Any) -> tuple[Options, EngineRequest]:
    return options(sampling=generation_pb2.SamplingParams(**values))


# field -> how its check is called, and its elements in one case more than it may have
Case = tuple[Callable[[], object], Iterable[Any]]


def _checks() -> Iterator[tuple[str, Callable[[], object], Iterable[Any]]]:
    ids = [1] * MANY
    for limits in (LIMITS, UNKNOWN):
        stop_ids = options(stopping=generation_pb2.StoppingParams(stop_token_ids=ids))
        listed = options(response=generation_pb2.ResponseOptions(logprob_token_ids=ids))
        choices = options(
            structured_output={"choices": generation_pb2.Choices(values=["x"] * MANY)}
        )
        allowed = sampling(allowed_token_ids=ids * (6 if limits is UNKNOWN else 1))
        bias = sampling(logit_bias=dict.fromkeys(range(MANY), 1.0))
        for index in (0, 1):
            for name, request, elements in (
                ("StoppingParams.stop_token_ids", stop_ids[index], ids),
                ("ResponseOptions.logprob_token_ids", listed[index], ids),
                ("Choices.values", choices[index], ids),
                ("SamplingParams.allowed_token_ids", allowed[index], ids),
                ("SamplingParams.logit_bias", bias[index], ids),
            ):
                yield name, lambda r=request, m=limits: validate_request(r, m), elements
        stop = Options(stop=["x"] * MANY)
        yield "GenerationOptions.stop", lambda r=stop, m=limits: validate_request(r, m), stop.stop
    tokens = generation_pb2.TokenIds(ids=ids)
    yield "TokenIds.ids", lambda: validate_prompt_ids(tokens.ids, LIMITS), tokens.ids
    yield "TokenIds.ids", lambda: check_token_ids(tokens, 1000), tokens.ids
    (full,) = parts(MANY)
    yield "ChatMessage.content", lambda: validate_messages([full]), full.content
    chat = tokenizer_pb2.TokenizerServiceRenderChatRequest.FromString(b"\x0a\x00" * MANY)
    for name in (
        "TokenizerServiceRenderChatRequest",
        "GatewayServiceChatRequest",
        "GatewayServiceChatStreamRequest",
        "Conversation",
    ):
        yield f"{name}.messages", lambda: validate_messages(chat.messages), chat.messages
    texts = tokenizer_pb2.TokenizerServiceEncodeBatchRequest(texts=["x"] * MANY).texts
    yield "TokenizerServiceEncodeBatchRequest.texts", lambda: check_texts(texts, 9, 9), texts


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def test_too_many_elements_are_refused_without_a_look_at_them() -> None:
    for name, check, elements in _checks():

        def refused(check: Callable[[], object] = check) -> None:
            with pytest.raises(ServiceError) as caught:
                check()
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT

        loop = min(cpu_seconds(lambda elements=elements: [0 for _ in elements]) for _ in range(3))
        assert min(cpu_seconds(refused) for _ in range(5)) < loop / 4, name


def repeated_fields(message: Descriptor, seen: set[str]) -> Iterator[str]:
    """The repeated fields of a message and of those inside."""
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.is_repeated:
            yield f"{message.name}.{field.name}"
        if field.message_type is not None and not is_map:
            yield from repeated_fields(field.message_type, seen)


def test_every_repeated_field_of_every_request_is_among_them() -> None:
    found: set[str] = set()
    for file in (gateway_pb2, engine_pb2, tokenizer_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found.update(repeated_fields(method.input_type, set()))
    assert found == {name for name, _, _ in _checks()}


def test_as_many_parts_as_allowed_are_accepted() -> None:
    def conversation(*counts: int) -> list[tokenizer_pb2.ChatMessage]:
        part = tokenizer_pb2.ContentPart(text="x")
        return [tokenizer_pb2.ChatMessage(role="user", content=[part] * n) for n in counts]

    validate_messages(conversation(MAX_CONTENT_PARTS))
    validate_messages(conversation(*[1] * (MAX_MESSAGES - 1), MAX_CONTENT_PARTS - MAX_MESSAGES + 1))
    for counts in ([MAX_CONTENT_PARTS + 1], [1, MAX_CONTENT_PARTS]):
        with pytest.raises(ServiceError, match="20000 parts in all") as caught:
            validate_messages(conversation(*counts))
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_no_more_empty_texts_are_reported_than_anyone_reads() -> None:
    with pytest.raises(ServiceError) as caught:
        check_texts([""] * 60_000, 65_536, 1000)
    assert [each.field for each in caught.value.violations] == [f"texts[{i}]" for i in range(8)]
