"""Every option of the contract reaches the wire, and only where it was given."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from nanoinfer import Client, Options
from nanoinfer.options import generation_options
from nanoinfer.v1 import gateway_pb2, generation_pb2

from tests.client.fake_gateway import Behaviour

# option, value, where it lands in GenerationOptions
ONE_BY_ONE: list[tuple[str, Any, str]] = [
    ("temperature", 0.0, "sampling"),
    ("temperature", 0.5, "sampling"),
    ("top_p", 0.0, "sampling"),
    ("top_k", 0, "sampling"),
    ("min_p", 0.0, "sampling"),
    ("repetition_penalty", 0.0, "sampling"),
    ("frequency_penalty", 0.0, "sampling"),
    ("presence_penalty", 0.0, "sampling"),
    ("no_repeat_ngram_size", 0, "sampling"),
    ("seed", 0, "sampling"),
    ("seed", 2**64 - 1, "sampling"),
    ("n", 0, "sampling"),
    ("max_tokens", 0, "stopping"),
    ("min_tokens", 0, "stopping"),
    ("ignore_eos", False, "stopping"),
    ("include_stop_in_output", False, "stopping"),
    ("logprobs", 0, "response"),
    ("prompt_logprobs", 0, "response"),
    ("return_token_ids", False, "response"),
    ("echo", False, "response"),
    ("skip_special_tokens", False, "response"),
    ("model", "", ""),
    ("truncate_prompt_tokens", 0, ""),
    ("cache_salt", "", ""),
    ("request_id", "my-id", ""),
]
REPEATED: list[tuple[str, Any, str, Any]] = [
    ("stop", ["a", "b"], "", ["a", "b"]),
    ("stop", "ab", "", ["ab"]),
    ("stop_token_ids", [1, 2], "stopping", [1, 2]),
    ("allowed_token_ids", (3, 4), "sampling", [3, 4]),
    ("logprob_token_ids", [0], "response", [0]),
    ("logit_bias", {5: -1.5}, "sampling", {5: -1.5}),
]
SHAPES = [
    ({"json_schema": {"type": "object"}}, "json_schema"),
    ({"json_schema": ""}, "json_schema"),
    ({"json_object": True}, "json_object"),
    ({"regex": "a+"}, "regex"),
    ({"grammar": "start: X"}, "grammar"),
    ({"choices": ["yes", "no"]}, "choices"),
]


def received(client: Client, behaviour: Behaviour, options: Options) -> Any:
    client.generate("x", **options)
    return behaviour.arrivals[-1].request.options


def test_nothing_given_is_nothing_sent(client: Client, behaviour: Behaviour) -> None:
    nothing = gateway_pb2.GenerationOptions()
    assert received(client, behaviour, {}) == nothing
    unset = dict.fromkeys(Options.__optional_keys__)
    assert received(client, behaviour, unset) == nothing  # type: ignore[arg-type]
    for part in ("sampling", "stopping", "response", "structured_output"):
        assert not behaviour.arrivals[-1].request.options.HasField(part)


@pytest.mark.parametrize(("name", "value", "part"), ONE_BY_ONE)
def test_a_scalar_is_present_exactly_where_it_was_given(
    client: Client, behaviour: Behaviour, name: str, value: Any, part: str
) -> None:
    options = received(client, behaviour, {name: value})  # type: ignore[misc]
    holder = getattr(options, part) if part else options
    assert holder.HasField(name)
    assert getattr(holder, name) == value
    assert [field.name for field, _ in holder.ListFields()] == [name]
    assert [field.name for field, _ in options.ListFields()] == [part or name]


@pytest.mark.parametrize(("name", "value", "part", "expected"), REPEATED)
def test_repeated_options(
    client: Client, behaviour: Behaviour, name: str, value: Any, part: str, expected: Any
) -> None:
    options = received(client, behaviour, {name: value})  # type: ignore[misc]
    found = getattr(getattr(options, part) if part else options, name)
    assert (dict(found) if isinstance(expected, dict) else list(found)) == expected


@pytest.mark.parametrize(("options", "case"), SHAPES)
def test_shapes(client: Client, behaviour: Behaviour, options: dict[str, Any], case: str) -> None:
    shape = received(client, behaviour, options).structured_output  # type: ignore[arg-type]
    assert shape.WhichOneof("constraint") == case
    value = options[case]
    if case == "choices":
        assert list(shape.choices.values) == value
    elif isinstance(value, dict):
        assert json.loads(shape.json_schema) == value
    elif isinstance(value, str):
        assert getattr(shape, case) == value


def contract_fields(descriptor: Descriptor) -> set[str]:
    return {field.name for field in descriptor.fields}


def test_no_field_of_the_contract_is_missing() -> None:
    parts = {"sampling", "stopping", "response", "structured_output"}
    expected = contract_fields(gateway_pb2.GenerationOptions.DESCRIPTOR) - parts
    for message in (
        generation_pb2.SamplingParams,
        generation_pb2.StoppingParams,
        generation_pb2.ResponseOptions,
        generation_pb2.StructuredOutput,
    ):
        expected |= contract_fields(message.DESCRIPTOR)
    expected.add("parse_special_tokens")  # beside the options, because chats have none of it
    call_options = {"timeout", "metadata", "priority", "tenant"}
    assert Options.__optional_keys__ - call_options == expected


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"max_tokens": -1}, ValueError, "max_tokens"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"top_k": "many"}, TypeError, "top_k"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids"),
        ({"stop_token_ids": "5"}, TypeError, "stop_token_ids"),
        ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias"),
        ({"stop": "\ud800"}, ValueError, "stop"),
        ({"regex": "a", "grammar": "b"}, ValueError, "regex and grammar"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_here(
    options: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        generation_options(options)


def test_parsing_special_tokens_is_for_prompts(client: Client, behaviour: Behaviour) -> None:
    for asked in (True, False):
        client.generate("x", parse_special_tokens=asked)
        request = behaviour.arrivals[-1].request
        assert request.HasField("parse_special_tokens")
        assert request.parse_special_tokens is asked
    client.generate("x")
    assert not behaviour.arrivals[-1].request.HasField("parse_special_tokens")
    with pytest.raises(TypeError, match="not for conversations"):
        client.chat([{"role": "user", "content": "x"}], parse_special_tokens=True)


def test_an_unknown_option(client: Client) -> None:
    with pytest.raises(TypeError, match="unknown option: max_new_tokens"):
        client.generate("x", max_new_tokens=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown option: temperature"):
        client.models(temperature=1.0)  # type: ignore[call-arg]


def test_metadata(client: Client, behaviour: Behaviour) -> None:
    client.generate(
        "x", request_id="abc", priority=0, tenant="t", metadata={"x-own": "1", "y-bin": b"\x00"}
    )
    metadata = behaviour.arrivals[-1].metadata
    assert metadata["x-request-id"] == "abc"
    assert metadata["x-nanoinfer-priority"] == "0"
    assert metadata["x-nanoinfer-tenant"] == "t"
    assert metadata["x-own"] == "1"
    assert metadata["y-bin"] == b"\x00"
    client.generate("x")
    first = behaviour.arrivals[-1].metadata["x-request-id"]
    assert "x-nanoinfer-priority" not in behaviour.arrivals[-1].metadata
    client.generate("x")
    assert len(first) == 36
    assert behaviour.arrivals[-1].metadata["x-request-id"] != first


@pytest.mark.parametrize(
    "options",
    [
        {"metadata": {"Bad Key": "1"}},
        {"metadata": {"x-own": b"1"}},
        {"metadata": {"x-bin": "1"}},
        {"tenant": "ä"},
        {"request_id": "a\nb"},
    ],
)
def test_metadata_that_cannot_travel(client: Client, options: Any) -> None:
    with pytest.raises(ValueError, match="metadata"):
        client.generate("x", **options)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": "x", "name": "a"}, "'name'"),
        ({"role": "user"}, "'content'"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "'type'"),
        ({"role": "user", "content": {"image_url": "x"}}, "'image_url'"),
        ({"role": "user", "content": b"x"}, "int"),
        ({"role": "assistant", "content": None}, "content is text, .* not NoneType"),
        ("hello", "str"),
    ],
)
def test_messages_of_another_form(client: Client, message: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        client.chat([message])
    with pytest.raises(TypeError, match=named):
        client.count_tokens([message])


@pytest.mark.parametrize("prompt", [b"x", bytearray(b"x"), None, 5, {"role": "user"}])
def test_what_is_no_prompt(client: Client, behaviour: Behaviour, prompt: Any) -> None:
    for ask in (client.generate, client.stream):
        with pytest.raises(TypeError, match="a prompt is text or token ids"):
            ask(prompt)
    assert behaviour.arrivals == []


def test_one_prompt_is_no_batch(client: Client) -> None:
    for prompts in ("abc", b"abc"):
        with pytest.raises(TypeError, match="sequence of prompts"):
            client.generate_batch(prompts)  # type: ignore[arg-type]


def test_an_empty_target() -> None:
    with pytest.raises(ValueError, match="target is empty"):
        Client("")


def test_prompts(client: Client, behaviour: Behaviour) -> None:
    client.generate("text")
    assert behaviour.arrivals[-1].request.text == "text"
    client.generate([5, 0])
    assert list(behaviour.arrivals[-1].request.token_ids.ids) == [5, 0]
    client.generate("")
    assert behaviour.arrivals[-1].request.WhichOneof("prompt") == "text"
    client.generate([])
    assert behaviour.arrivals[-1].request.WhichOneof("prompt") == "token_ids"
    client.chat([{"role": "system", "content": ["a", "b"]}, {"role": "user", "content": "c"}], n=2)
    arrival = behaviour.arrivals[-1]
    assert [message.role for message in arrival.request.messages] == ["system", "user"]
    assert [part.text for part in arrival.request.messages[0].content] == ["a", "b"]
    assert arrival.request.options.sampling.n == 2
    with pytest.raises(TypeError, match="not a string"):
        client.chat("hello")  # type: ignore[arg-type]
