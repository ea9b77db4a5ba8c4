"""Every field: unset, zero, both bounds, one beyond each, NaN; and the features they need."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer.v1 import tokenizer_pb2
from nanoinfer.v1.gateway_pb2 import GenerationOptions
from nanoinfer_common import validation
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.field_checks import is_label
from nanoinfer_common.validation import (
    Limits,
    read_metadata,
    validate_messages,
    validate_prompt_ids,
)

VOCAB = 1000
LENGTH = 128
ALL = frozenset(pb.Feature.values())
LIMITS = Limits(vocab_size=VOCAB, max_model_len=LENGTH, features=ALL)


def validate_request(*, limits: Limits, **fields: Any) -> None:
    validation.validate_request(GenerationOptions(**fields), limits)


def next_float(value: float, towards: float) -> float:
    """The next 32-bit float, because that is what travels."""
    bits = struct.unpack("<i", struct.pack("<f", value))[0]
    if value == 0:
        return math.copysign(1e-45, towards)
    step = 1 if abs(towards) > abs(value) else -1
    return float(struct.unpack("<f", struct.pack("<i", bits + step))[0])


def fields_of(error: ServiceError) -> list[str]:
    return [violation.field for violation in error.violations]


def refused(limits: Limits = LIMITS, **arguments: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        validate_request(**arguments, limits=limits)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value


# field -> lowest, highest, whether the lowest is itself out of range
FLOATS = {
    "temperature": (0.0, 2.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.0, 10.0, True),
    "frequency_penalty": (-2.0, 2.0, False),
    "presence_penalty": (-2.0, 2.0, False),
}


def test_nothing_given_is_fine() -> None:
    validate_request(limits=LIMITS)
    validate_request(limits=Limits(features=frozenset()))
    empty = pb.StructuredOutput()
    validate_request(
        sampling=pb.SamplingParams(), structured_output=empty, limits=Limits(features=())
    )


@pytest.mark.matrix("R16", "R17")
@pytest.mark.parametrize("field", FLOATS)
def test_float_bounds(field: str) -> None:
    low, high, exclusive = FLOATS[field]
    inside = [high, next_float(low, math.inf) if exclusive else low, (low + high) / 2]
    for value in inside:
        validate_request(sampling=pb.SamplingParams(**{field: value}), limits=LIMITS)
    outside = [next_float(high, math.inf), low if exclusive else next_float(low, -math.inf)]
    for value in [*outside, math.nan, math.inf, -math.inf, 1e9, -1e9]:
        error = refused(sampling=pb.SamplingParams(**{field: value}))
        assert fields_of(error) == [f"sampling.{field}"], value
        assert error.reason == "INVALID_SAMPLING_PARAMS"


@pytest.mark.parametrize("field", FLOATS)
@given(value=st.floats(width=32))
def test_random_floats_pass_exactly_within_range(field: str, value: float) -> None:
    low, high, exclusive = FLOATS[field]
    valid = math.isfinite(value) and (value > low if exclusive else value >= low) and value <= high
    sampling = pb.SamplingParams(**{field: value})
    if valid:
        validate_request(sampling=sampling, limits=LIMITS)
    else:
        assert fields_of(refused(sampling=sampling)) == [f"sampling.{field}"]


Message = pb.SamplingParams | pb.StoppingParams | pb.ResponseOptions

# argument, field, accepted values, refused values
INTEGERS: list[tuple[str, type[Any], str, Sequence[int], Sequence[int]]] = [
    ("sampling", pb.SamplingParams, "top_k", [0, 1, 2**32 - 1], []),
    ("sampling", pb.SamplingParams, "seed", [0, 2**64 - 1], []),
    ("sampling", pb.SamplingParams, "n", [1, 16], [0, 17, 10**9]),
    ("sampling", pb.SamplingParams, "no_repeat_ngram_size", [0, 1, 64], [65, 2**32 - 1]),
    ("stopping", pb.StoppingParams, "max_tokens", [1, 2**31 - 1], [0, 2**31, 2**32 - 1]),
    ("stopping", pb.StoppingParams, "min_tokens", [0, LENGTH - 1], [LENGTH]),
    ("stopping", pb.StoppingParams, "ignore_eos", [0, 1], []),
    ("stopping", pb.StoppingParams, "include_stop_in_output", [0, 1], []),
    ("response", pb.ResponseOptions, "logprobs", [0, 20], [21, 2**32 - 1]),
    ("response", pb.ResponseOptions, "prompt_logprobs", [0, 20], [21]),
    ("response", pb.ResponseOptions, "return_token_ids", [0, 1], []),
    ("response", pb.ResponseOptions, "echo", [0, 1], []),
    ("response", pb.ResponseOptions, "skip_special_tokens", [0, 1], []),
]


@pytest.mark.matrix("R19", "R26")
@pytest.mark.parametrize(("argument", "kind", "field", "accepted", "wrong"), INTEGERS)
def test_integer_bounds(
    argument: str, kind: type[Any], field: str, accepted: Sequence[int], wrong: Sequence[int]
) -> None:
    boolean = kind.DESCRIPTOR.fields_by_name[field].type == 8
    for value in accepted:
        message = kind(**{field: bool(value) if boolean else value})
        validate_request(**{argument: message}, limits=LIMITS)
    for value in wrong:
        error = refused(**{argument: kind(**{field: value})})
        assert fields_of(error) == [f"{argument}.{field}"]


def test_every_field_of_the_messages_is_in_a_table() -> None:
    lists = {"logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids"}
    tested = {*FLOATS, *lists, *(field for _, _, field, _, _ in INTEGERS)}
    for message in (pb.SamplingParams, pb.StoppingParams, pb.ResponseOptions):
        assert {field.name for field in message.DESCRIPTOR.fields} <= tested


def test_min_tokens_is_at_most_max_tokens() -> None:
    validate_request(stopping=pb.StoppingParams(min_tokens=5, max_tokens=5), limits=LIMITS)
    error = refused(stopping=pb.StoppingParams(min_tokens=6, max_tokens=5))
    assert fields_of(error) == ["stopping.min_tokens"]
    assert error.reason == "INVALID_STOPPING_PARAMS"


@pytest.mark.matrix("R23")
@pytest.mark.parametrize(
    ("argument", "kind", "field", "most"),
    [
        ("sampling", pb.SamplingParams, "allowed_token_ids", VOCAB),
        ("stopping", pb.StoppingParams, "stop_token_ids", 64),
        ("response", pb.ResponseOptions, "logprob_token_ids", 128),
    ],
)
def test_id_lists(argument: str, kind: type[Any], field: str, most: int) -> None:
    for ids in ([], [0], [VOCAB - 1], [7] * most):
        validate_request(**{argument: kind(**{field: ids})}, limits=LIMITS)
    for ids in ([VOCAB], [1, 2**32 - 1], [7] * (most + 1)):
        assert fields_of(refused(**{argument: kind(**{field: ids})})) == [f"{argument}.{field}"]
    unknown = Limits(vocab_size=None, max_model_len=None, features=ALL)
    validate_request(**{argument: kind(**{field: [2**32 - 1]})}, limits=unknown)


@pytest.mark.matrix("R24")
def test_logit_bias() -> None:
    for bias in ({}, {0: -100.0, VOCAB - 1: 100.0}, {index % VOCAB: 0.0 for index in range(1024)}):
        validate_request(sampling=pb.SamplingParams(logit_bias=bias), limits=LIMITS)
    wide = Limits(vocab_size=200_000, features=ALL)
    full = {index: 1.0 for index in range(1024)}
    validate_request(sampling=pb.SamplingParams(logit_bias=full), limits=wide)
    bad: list[dict[int, float]] = [
        {VOCAB: 1.0},
        {1: math.nan},
        {1: math.inf},
        {1: 100.1},
        {1: -100.1},
        {index: 0.0 for index in range(1025)},
        {index: math.nan for index in range(100_000)},
    ]
    for bias in bad:
        error = refused(sampling=pb.SamplingParams(logit_bias=bias))
        assert set(fields_of(error)) == {"sampling.logit_bias"}


@pytest.mark.matrix("R21")
def test_stop_strings() -> None:
    for stop in ([], ["x"] * 16, ["x" * 256], ["é" * 128]):
        validate_request(stop=stop, limits=LIMITS)
    assert fields_of(refused(stop=["x"] * 17)) == ["stop"]
    assert fields_of(refused(stop=["x"] * 10_000)) == ["stop"]
    for bad in ("", "x" * 257, "é" * 129, "x" * 1_000_000):
        error = refused(stop=["fine", bad])
        assert fields_of(error) == ["stop[1]"]
        assert error.reason == "INVALID_STOPPING_PARAMS"


DEEPEST = '{"a":' * 63 + "{}" + "}" * 63

STRUCTURED = {
    "json_schema": (
        ["{}", "true", '{"type":"object"}', DEEPEST, '"x"'.join(['{"a":', "}"])],
        [
            *("", "nonsense", "[]", "1", '{"a":NaN}', "{", "[" * 60_000),
            '{"a":' + DEEPEST + "}",
            '{"a":"' + "x" * 65536 + '"}',
        ],
    ),
    "regex": (["a", "é" * 2048], ["", "a" * 4097, "é" * 2049]),
    "grammar": (["start: 'a'", "a" * 65536], ["", "a" * 65537]),
}


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_output(kind: str) -> None:
    accepted, wrong = STRUCTURED[kind]
    for text in accepted:
        output = pb.StructuredOutput(**{kind: text})
        validate_request(structured_output=output, limits=LIMITS)
    for text in wrong:
        error = refused(structured_output=pb.StructuredOutput(**{kind: text}))
        assert fields_of(error) == [f"structured_output.{kind}"]
        assert error.reason == "INVALID_STRUCTURED_OUTPUT"


def test_structured_choices() -> None:
    for values in (["a"], ["a"] * 256):
        output = pb.StructuredOutput(choices=pb.Choices(values=values))
        validate_request(structured_output=output, limits=LIMITS)
    for values in ([], ["a"] * 257, ["a", ""]):
        output = pb.StructuredOutput(choices=pb.Choices(values=values))
        assert fields_of(refused(structured_output=output)) == ["structured_output.choices"]


def test_envelope() -> None:
    for label in (None, "a", "!~" * 64):
        validate_request(request_id=label, limits=LIMITS)
    for label in ("", "a b", "x" * 129, "é", "a\n"):
        error = refused(request_id=label)
        assert (fields_of(error), error.reason) == (["request_id"], "INVALID_REQUEST")
    for salt in (None, "", "x" * 64, "é" * 32):
        validate_request(cache_salt=salt, limits=LIMITS)
    for salt in ("x" * 65, "é" * 33):
        assert fields_of(refused(cache_salt=salt)) == ["cache_salt"]
    for most in (None, 1, LENGTH - 1):
        validate_request(truncate_prompt_tokens=most, limits=LIMITS)
    for most in (0, LENGTH, 2**32 - 1):
        assert fields_of(refused(truncate_prompt_tokens=most)) == ["truncate_prompt_tokens"]


def test_all_violations_come_at_once_and_win_over_features() -> None:
    error = refused(
        Limits(vocab_size=VOCAB, features=frozenset()),
        sampling=pb.SamplingParams(top_p=0, temperature=math.nan, n=5),
        stopping=pb.StoppingParams(max_tokens=0),
        response=pb.ResponseOptions(logprobs=21),
        stop=[""],
    )
    assert fields_of(error) == [
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
        "stop[0]",
        "response.logprobs",
    ]


FEATURES: list[tuple[dict[str, Any], str, str]] = [
    ({"sampling": pb.SamplingParams(n=2)}, "MULTIPLE_CHOICES", "sampling.n"),
    (
        {"sampling": pb.SamplingParams(repetition_penalty=1.1)},
        "PENALTIES",
        "sampling.repetition_penalty",
    ),
    (
        {"sampling": pb.SamplingParams(frequency_penalty=-1)},
        "PENALTIES",
        "sampling.frequency_penalty",
    ),
    (
        {"sampling": pb.SamplingParams(presence_penalty=0.5)},
        "PENALTIES",
        "sampling.presence_penalty",
    ),
    (
        {"sampling": pb.SamplingParams(no_repeat_ngram_size=2)},
        "PENALTIES",
        "sampling.no_repeat_ngram_size",
    ),
    ({"sampling": pb.SamplingParams(logit_bias={1: 0.0})}, "LOGIT_BIAS", "sampling.logit_bias"),
    (
        {"sampling": pb.SamplingParams(allowed_token_ids=[1])},
        "ALLOWED_TOKEN_IDS",
        "sampling.allowed_token_ids",
    ),
    ({"response": pb.ResponseOptions(logprobs=0)}, "LOGPROBS", "response.logprobs"),
    (
        {"response": pb.ResponseOptions(prompt_logprobs=0)},
        "PROMPT_LOGPROBS",
        "response.prompt_logprobs",
    ),
    (
        {"response": pb.ResponseOptions(logprob_token_ids=[1])},
        "LOGPROB_TOKEN_IDS",
        "response.logprob_token_ids",
    ),
    ({"response": pb.ResponseOptions(echo=True)}, "ECHO", "response.echo"),
    (
        {"structured_output": pb.StructuredOutput(json_object=pb.JsonObject())},
        "STRUCTURED_OUTPUT",
        "structured_output",
    ),
    ({"truncate_prompt_tokens": 5}, "TRUNCATE_PROMPT", "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("arguments", "feature", "field"), FEATURES)
def test_features(arguments: dict[str, Any], feature: str, field: str) -> None:
    name = f"FEATURE_{feature}"
    value = pb.Feature.Value(name)
    validate_request(**arguments, limits=Limits(features=frozenset({value})))
    validate_request(**arguments, limits=Limits(features=None))
    with pytest.raises(ServiceError) as caught:
        validate_request(**arguments, limits=Limits(features=ALL - {value}))
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "FEATURE_DISABLED")
    assert error.metadata == {"feature": name, "field": field}
    assert field in error.message


def test_neutral_values_need_no_feature() -> None:
    neutral = pb.SamplingParams(
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        no_repeat_ngram_size=0,
        n=1,
    )
    response = pb.ResponseOptions(echo=False)
    validate_request(sampling=neutral, response=response, limits=Limits(features=()))


def test_every_request_feature_is_tested() -> None:
    tested = {f"FEATURE_{feature}" for _, feature, _ in FEATURES}
    # Prefix caching is asked for by no field: a salt separates entries, and none are shared.
    assert set(pb.Feature.keys()) - tested == {"FEATURE_UNSPECIFIED", "FEATURE_PREFIX_CACHING"}


def test_limits_of_a_model() -> None:
    info = pb.ModelInfo(vocab_size=5, max_model_len=7, features=[pb.FEATURE_ECHO])
    assert Limits.of(info) == Limits(5, 7, frozenset({pb.FEATURE_ECHO}))


@pytest.mark.matrix("R27")
def test_prompt_ids() -> None:
    for ids in ([0], [VOCAB - 1], [1] * (LENGTH - 1)):
        validate_prompt_ids(ids, LIMITS)
    validate_prompt_ids([2**32 - 1] * 500, Limits())
    expected = [
        ([], "INVALID_PROMPT"),
        ([VOCAB], "INVALID_PROMPT"),
        ([1] * LENGTH, "PROMPT_TOO_LONG"),
    ]
    for ids, reason in expected:
        with pytest.raises(ServiceError) as caught:
            validate_prompt_ids(ids, LIMITS)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.reason == reason
    assert caught.value.metadata == {"promptTokens": "128", "maxModelLen": "128"}


def message(role: str, *texts: str) -> tokenizer_pb2.ChatMessage:
    parts = [tokenizer_pb2.ContentPart(text=text) for text in texts]
    return tokenizer_pb2.ChatMessage(role=role, content=parts)


def test_messages() -> None:
    validate_messages([message("user", "hi")])
    validate_messages([message("user", "")] * 10_000)
    unknown = tokenizer_pb2.ChatMessage(role="user", content=[tokenizer_pb2.ContentPart()])
    bad = [
        ([], "messages"),
        ([message("user", "hi")] * 10_001, "messages"),
        ([message("user", "hi"), message("", "hi")], "messages[1].role"),
        ([message("r" * 65, "hi")], "messages[0].role"),
        ([message("user")], "messages[0].content"),
        ([unknown], "messages[0].content"),
    ]
    for messages, field in bad:
        with pytest.raises(ServiceError) as caught:
            validate_messages(messages)
        assert caught.value.reason == "INVALID_MESSAGES"
        assert fields_of(caught.value) == [field]
    with pytest.raises(ServiceError) as caught:
        validate_messages([message("")] * 10_000)
    assert len(caught.value.violations) <= 10


def test_metadata() -> None:
    found = read_metadata(())
    assert (len(found.request_id), found.priority, found.tenant) == (36, 0, None)
    given_ = (("x-request-id", "a"), ("x-nanoinfer-priority", "-100"), ("x-nanoinfer-tenant", "t"))
    found = read_metadata(given_)
    assert found == validation.RequestMetadata("a", -100, "t")
    assert read_metadata((("x-nanoinfer-priority", "100"),)).priority == 100
    assert read_metadata(None, "mine").request_id == "mine"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("x-nanoinfer-priority", ["101"]),
        ("x-nanoinfer-priority", ["-101"]),
        ("x-nanoinfer-priority", ["1.5"]),
        ("x-nanoinfer-priority", [""]),
        ("x-nanoinfer-priority", ["٣"]),
        ("x-nanoinfer-priority", ["1" * 5000]),
        ("x-nanoinfer-priority", ["1", "2"]),
        ("x-nanoinfer-tenant", [""]),
        ("x-nanoinfer-tenant", ["a b"]),
        ("x-nanoinfer-tenant", ["x" * 65]),
        ("x-nanoinfer-tenant", ["a", "b"]),
        ("x-request-id", ["x" * 129]),
        ("x-request-id", ["a", "b"]),
    ],
)
def test_bad_metadata(key: str, values: list[str]) -> None:
    with pytest.raises(ServiceError) as caught:
        read_metadata([(key, value) for value in values])
    assert caught.value.reason == "INVALID_METADATA"
    assert fields_of(caught.value) == [key]


@given(st.text(max_size=6))
def test_labels_are_visible_ascii(text: str) -> None:
    visible = text.isascii() and text.isprintable() and " " not in text and 0 < len(text) <= 4
    assert is_label(text, 4) is visible
