"""The rules of each field: what is out of range, and what needs a feature.

Each check yields violations with paths such as `sampling.top_p`; unset fields pass. Ids are checked
against the vocabulary, and lengths against the model, where the limits know them.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn, Self, TypeAlias

from google.protobuf.message import Message
from nanoinfer.v1 import engine_pb2, gateway_pb2
from nanoinfer.v1 import generation_pb2 as pb

from nanoinfer_common.errors import Violation

ParameterMessage: TypeAlias = (
    gateway_pb2.GenerationOptions | engine_pb2.EngineServiceGenerateRequest
)

MAX_TOKENS: Final = 2**31 - 1
MAX_STOP_STRINGS: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_SCHEMA_DEPTH: Final = 64
MAX_REGEX_BYTES: Final = 4 * 1024
MAX_STRUCTURED_CHOICES: Final = 256
MAX_REQUEST_ID_CHARS: Final = 128
MAX_CACHE_SALT_BYTES: Final = 64


class _Range(NamedTuple):
    low: int
    high: int
    above_low: bool = False

    def holds(self, value: float) -> bool:
        # NaN and infinities fail one of the comparisons.
        return (value > self.low if self.above_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"more than {self.low}" if self.above_low else str(self.low)
        return f"must be {low} to {self.high}"


_RANGES: Final = {
    "sampling.temperature": _Range(0, 2),
    "sampling.top_p": _Range(0, 1, above_low=True),
    "sampling.min_p": _Range(0, 1),
    "sampling.repetition_penalty": _Range(0, 10, above_low=True),
    "sampling.frequency_penalty": _Range(-2, 2),
    "sampling.presence_penalty": _Range(-2, 2),
    "sampling.n": _Range(1, 16),
    "sampling.no_repeat_ngram_size": _Range(0, 64),
    "stopping.max_tokens": _Range(1, MAX_TOKENS),
    "response.logprobs": _Range(0, 20),
    "response.prompt_logprobs": _Range(0, 20),
}
_BIAS_RANGE: Final = _Range(-100, 100)
# More ids than any vocabulary has; the bound of a list as long as one that is not known.
MAX_LISTED_IDS: Final = 2**20
# How many ids a field may list; None is as many as the vocabulary has.
_MAX_IDS: Final = {
    "sampling.logit_bias": 1024,
    "sampling.allowed_token_ids": None,
    "stopping.stop_token_ids": 64,
    "response.logprob_token_ids": 128,
}
# What a field needs unless it is unset or has the neutral value beside.
_FEATURES: Final[Mapping[str, tuple[pb.Feature, object]]] = {
    "sampling.n": (pb.FEATURE_MULTIPLE_CHOICES, 1),
    "sampling.repetition_penalty": (pb.FEATURE_PENALTIES, 1.0),
    "sampling.frequency_penalty": (pb.FEATURE_PENALTIES, 0.0),
    "sampling.presence_penalty": (pb.FEATURE_PENALTIES, 0.0),
    "sampling.no_repeat_ngram_size": (pb.FEATURE_PENALTIES, 0),
    "sampling.logit_bias": (pb.FEATURE_LOGIT_BIAS, None),
    "sampling.allowed_token_ids": (pb.FEATURE_ALLOWED_TOKEN_IDS, None),
    "response.logprobs": (pb.FEATURE_LOGPROBS, None),
    "response.prompt_logprobs": (pb.FEATURE_PROMPT_LOGPROBS, None),
    "response.logprob_token_ids": (pb.FEATURE_LOGPROB_TOKEN_IDS, None),
    "response.echo": (pb.FEATURE_ECHO, False),
    "structured_output": (pb.FEATURE_STRUCTURED_OUTPUT, pb.StructuredOutput()),
    "truncate_prompt_tokens": (pb.FEATURE_TRUNCATE_PROMPT, None),
}


@dataclass(frozen=True)
class Limits:
    """What the served model bounds; None is not checked. `features` are values of `pb.Feature`."""

    vocab_size: int | None = None
    max_model_len: int | None = None
    features: Collection[int] | None = None

    @classmethod
    def of(cls, model: pb.ModelInfo) -> Self:
        """Returns the limits that a model's description publishes."""
        return cls(model.vocab_size, model.max_model_len, frozenset(model.features))


def check_all(request: ParameterMessage, limits: Limits) -> Iterator[Violation]:
    """Checks every field but the prompt."""
    yield from check_fields("sampling", request.sampling, limits)
    yield from check_fields("stopping", request.stopping, limits)
    yield from check_min_tokens(request.stopping, limits)
    if isinstance(request, gateway_pb2.GenerationOptions):
        yield from check_stop(request.stop)
    yield from check_fields("response", request.response, limits)
    yield from check_structured_output(request.structured_output)
    yield from check_envelope(request, limits)


def check_fields(prefix: str, message: Message, limits: Limits) -> Iterator[Violation]:
    """Checks the ranges and id lists of `sampling`, `stopping` or `response`."""
    for descriptor, value in message.ListFields():
        path = f"{prefix}.{descriptor.name}"
        if path in _RANGES and not _RANGES[path].holds(value):
            yield Violation(path, str(_RANGES[path]))
        if path in _MAX_IDS:
            most = _MAX_IDS[path] or limits.vocab_size or MAX_LISTED_IDS
            if len(value) > most:
                yield Violation(path, f"must have at most {most} entries")
            elif path.endswith("_bias") and not all(map(_BIAS_RANGE.holds, value.values())):
                yield Violation(path, str(_BIAS_RANGE))
            else:
                yield from check_ids(path, value, limits)


def check_min_tokens(stopping: pb.StoppingParams, limits: Limits) -> Iterator[Violation]:
    """Checks that the least number of tokens can be reached."""
    most = limits.max_model_len
    if stopping.HasField("max_tokens"):
        if stopping.min_tokens > stopping.max_tokens:
            yield Violation("stopping.min_tokens", "must be at most max_tokens")
    elif stopping.min_tokens > (MAX_TOKENS if most is None else most - 1):
        yield Violation("stopping.min_tokens", "must fit into the model's context")


def check_stop(stop: Sequence[str]) -> Iterator[Violation]:
    """Checks stop strings."""
    if len(stop) > MAX_STOP_STRINGS:
        yield Violation("stop", f"must have at most {MAX_STOP_STRINGS} entries")
        return
    for index, string in enumerate(stop):
        # Counted in characters first, so that a huge string is not encoded to be refused.
        if not string or len(string) > MAX_STOP_BYTES or len(string.encode()) > MAX_STOP_BYTES:
            yield Violation(f"stop[{index}]", f"must be 1 to {MAX_STOP_BYTES} bytes")


def check_structured_output(structured: pb.StructuredOutput) -> Iterator[Violation]:
    """Checks a constraint's size and form; whether it compiles, its compiler tells."""
    kind = structured.WhichOneof("constraint")
    path = f"structured_output.{kind}"
    if kind in ("json_schema", "regex", "grammar"):
        text: str = getattr(structured, kind)
        most = MAX_REGEX_BYTES if kind == "regex" else MAX_SCHEMA_BYTES
        if not 0 < len(text.encode()) <= most:
            yield Violation(path, f"must be 1 to {most} bytes")
        elif kind == "json_schema" and not _is_schema(text):
            yield Violation(path, f"must be a JSON Schema of depth {MAX_SCHEMA_DEPTH} at most")
    elif kind == "choices":
        values = structured.choices.values
        if not 1 <= len(values) <= MAX_STRUCTURED_CHOICES or not all(values):
            yield Violation(path, f"must be 1 to {MAX_STRUCTURED_CHOICES} non-empty strings")


def check_envelope(request: ParameterMessage, limits: Limits) -> Iterator[Violation]:
    """Checks a request's fields beside its parameters."""
    if request.HasField("request_id") and not is_label(request.request_id, MAX_REQUEST_ID_CHARS):
        rule = f"must be 1 to {MAX_REQUEST_ID_CHARS} visible ASCII characters"
        yield Violation("request_id", rule)
    if len(request.cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
        yield Violation("cache_salt", f"must be at most {MAX_CACHE_SALT_BYTES} bytes")
    if request.HasField("truncate_prompt_tokens"):
        most = MAX_TOKENS if limits.max_model_len is None else limits.max_model_len - 1
        if not 1 <= request.truncate_prompt_tokens <= most:
            yield Violation("truncate_prompt_tokens", f"must be 1 to {most}")


def check_ids(path: str, ids: Collection[int], limits: Limits) -> Iterator[Violation]:
    """Checks that every id is below the vocabulary size; names the first that is not.

    How many there are has been checked before.
    """
    size = limits.vocab_size
    # The maximum first: it is found at C speed, and bad ids are rare.
    if size is not None and len(ids) and max(ids) >= size:
        worst = next(token_id for token_id in ids if token_id >= size)
        yield Violation(path, f"has id {worst}; ids must be below {size}")


def features_asked(request: ParameterMessage) -> Iterator[tuple[str, pb.Feature]]:
    """Lists the fields that need a feature, each with it."""
    parts: tuple[tuple[str, Message], ...] = (
        ("sampling.", request.sampling),
        ("response.", request.response),
        ("", request),
    )
    for prefix, message in parts:
        for descriptor, value in message.ListFields():
            feature, neutral = _FEATURES.get(f"{prefix}{descriptor.name}", (None, None))
            # A list is set where it is not empty; to compare it would copy it.
            if feature is not None and (neutral is None or value != neutral):
                yield f"{prefix}{descriptor.name}", feature


def is_label(value: str, max_chars: int) -> bool:
    """Says whether `value` is 1 to `max_chars` visible ASCII characters."""
    return 0 < len(value) <= max_chars and all("!" <= character <= "~" for character in value)


def _is_schema(text: str) -> bool:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            return False
        nested = (value for value in level if isinstance(value, dict | list))
        level = [
            inner
            for value in nested
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return isinstance(schema, dict | bool)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
