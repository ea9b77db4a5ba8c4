"""Free text in requests: every field that carries any is known here, and none is a template."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from nanoinfer.v1 import engine_pb2, gateway_pb2, tokenizer_pb2

TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
# What the text is for. A field that is added to a request belongs here, or is refused here: text
# that is run as a program (a template, code, an address to fetch) comes from the operator alone.
KNOWN = {
    "ChatMessage.role": "compared with the roles of the template",
    "ContentPart.text": "encoded",
    "Choices.values": "matched, never run",
    "EngineServiceGenerateRequest.cache_salt": "a key",
    "EngineServiceGenerateRequest.model": "a name",
    "EngineServiceGenerateRequest.request_id": "a label",
    "EngineServiceGenerateRequest.tokenizer_fingerprint": "compared",
    "GatewayServiceCountTokensRequest.model": "a name",
    "GatewayServiceCountTokensRequest.text": "encoded",
    "GatewayServiceGenerateRequest.text": "encoded",
    "GatewayServiceGenerateStreamRequest.text": "encoded",
    "GatewayServiceGetModelInfoRequest.model": "a name",
    "GatewayServiceListModelsRequest.page_token": "a place in a list",
    "GenerationOptions.cache_salt": "a key",
    "GenerationOptions.model": "a name",
    "GenerationOptions.request_id": "a label",
    "GenerationOptions.stop": "compared",
    "StructuredOutput.grammar": "refused: not built",
    "StructuredOutput.json_schema": "refused: not built",
    "StructuredOutput.regex": "refused: not built",
    "TokenizerServiceEncodeBatchRequest.texts": "encoded",
    "TokenizerServiceEncodeRequest.text": "encoded",
}


def requests() -> list[Descriptor]:
    """The request messages of every RPC."""
    files = (gateway_pb2.DESCRIPTOR, engine_pb2.DESCRIPTOR, tokenizer_pb2.DESCRIPTOR)
    services = [service for file in files for service in file.services_by_name.values()]
    return [method.input_type for service in services for method in service.methods]


def fields(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """Every field that a message can hold, at any depth."""
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type is not None:
            yield from fields(field.message_type, seen)


def name(field: FieldDescriptor) -> str:
    return f"{field.containing_type.name}.{field.name}"


@pytest.fixture(scope="module")
def reachable() -> list[FieldDescriptor]:
    seen: set[str] = set()
    return [field for message in requests() for field in fields(message, seen)]


@pytest.mark.matrix("R32")
def test_no_request_can_carry_a_template(reachable: list[FieldDescriptor]) -> None:
    assert len(requests()) > 15
    texts = {name(field) for field in reachable if field.type in TEXTS}
    assert texts == set(KNOWN)
    words = ("template", "jinja", "script", "url", "uri", "path", "file")
    assert [name(f) for f in reachable if any(word in f.name for word in words)] == []


@pytest.mark.matrix("R32")
def test_requests_hold_no_message_of_unknown_shape(reachable: list[FieldDescriptor]) -> None:
    """`Any`, `Struct` and their like would carry a template past the list of fields."""
    foreign = {
        field.message_type.full_name
        for field in reachable
        if field.message_type is not None and field.message_type.file.package != "nanoinfer.v1"
    }
    assert foreign == set()
