"""The rules of each field: what is out of range, and what needs a feature.

Each check yields violations with paths such as `sampling.top_p`; unset fields pass. Ids are checked
against the vocabulary, and lengths against the model, where the limits know them.
"""

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn, Self

from google.protobuf.message import Message
from nanoinfer.v1 import generation_pb2 as pb

from nanoinfer_common.errors import Violation

MAX_CHOICES: Final = 16
MAX_LOGIT_BIAS: Final = 1024
MAX_TOKENS: Final = 2**31 - 1
MAX_STOP_TOKEN_IDS: Final = 64
MAX_STOP_STRINGS: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_LOGPROBS: Final = 20
MAX_LOGPROB_TOKEN_IDS: Final = 128
MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_SCHEMA_DEPTH: Final = 64
MAX_REGEX_BYTES: Final = 4 * 1024
MAX_STRUCTURED_CHOICES: Final = 256
MAX_REQUEST_ID_CHARS: Final = 128
MAX_CACHE_SALT_BYTES: Final = 64
# More than this many bad list entries are not told one by one.
MAX_REPORTED: Final = 8


class _Range(NamedTuple):
    low: float
    high: float
    above_low: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.above_low else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above_low else f"{self.low:g}"
        return f"must be {low} to {self.high:g}, finite"


_SAMPLING_RANGES: Final = {
    "temperature": _Range(0, 2),
    "top_p": _Range(0, 1, above_low=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, 10, above_low=True),
    "frequency_penalty": _Range(-2, 2),
    "presence_penalty": _Range(-2, 2),
}
_LOGIT_BIAS_RANGE: Final = _Range(-100, 100)


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


def check_sampling(sampling: pb.SamplingParams, limits: Limits) -> Iterator[Violation]:
    """Checks how tokens are chosen."""
    for name, allowed in _SAMPLING_RANGES.items():
        value = _given(sampling, name)
        if value is not None and not allowed.holds(value):
            yield Violation(f"sampling.{name}", str(allowed))
    yield from _check_count(sampling, "sampling", "n", 1, MAX_CHOICES)
    path = "sampling.logit_bias"
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        yield Violation(path, f"must have at most {MAX_LOGIT_BIAS} entries")
    else:
        yield from check_ids(path, list(sampling.logit_bias), limits)
        if not all(map(_LOGIT_BIAS_RANGE.holds, sampling.logit_bias.values())):
            yield Violation(path, str(_LOGIT_BIAS_RANGE))
    allowed_ids, path = sampling.allowed_token_ids, "sampling.allowed_token_ids"
    if limits.vocab_size is not None and len(allowed_ids) > limits.vocab_size:
        yield Violation(path, f"must have at most {limits.vocab_size} entries")
    else:
        yield from check_ids(path, allowed_ids, limits)


def check_stopping(stopping: pb.StoppingParams, limits: Limits) -> Iterator[Violation]:
    """Checks when to stop, stop strings aside."""
    yield from _check_count(stopping, "stopping", "max_tokens", 1, MAX_TOKENS)
    most = limits.max_model_len
    if stopping.HasField("max_tokens"):
        if stopping.min_tokens > stopping.max_tokens:
            yield Violation("stopping.min_tokens", "must be at most max_tokens")
    elif stopping.min_tokens > (MAX_TOKENS if most is None else most - 1):
        yield Violation("stopping.min_tokens", "must fit into the model's context")
    path = "stopping.stop_token_ids"
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield Violation(path, f"must have at most {MAX_STOP_TOKEN_IDS} entries")
    else:
        yield from check_ids(path, stopping.stop_token_ids, limits)


def check_stop(stop: Sequence[str]) -> Iterator[Violation]:
    """Checks stop strings."""
    if len(stop) > MAX_STOP_STRINGS:
        yield Violation("stop", f"must have at most {MAX_STOP_STRINGS} entries")
        return
    for index, string in enumerate(stop):
        # Counted in characters first, so that a huge string is not encoded to be refused.
        if not string or len(string) > MAX_STOP_BYTES or len(string.encode()) > MAX_STOP_BYTES:
            yield Violation(f"stop[{index}]", f"must be 1 to {MAX_STOP_BYTES} bytes")


def check_response(response: pb.ResponseOptions, limits: Limits) -> Iterator[Violation]:
    """Checks what the response carries."""
    for name in ("logprobs", "prompt_logprobs"):
        yield from _check_count(response, "response", name, 0, MAX_LOGPROBS)
    path = "response.logprob_token_ids"
    if len(response.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
        yield Violation(path, f"must have at most {MAX_LOGPROB_TOKEN_IDS} entries")
    else:
        yield from check_ids(path, response.logprob_token_ids, limits)


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


def check_envelope(
    request_id: str | None,
    cache_salt: str | None,
    truncate_prompt_tokens: int | None,
    limits: Limits,
) -> Iterator[Violation]:
    """Checks a request's fields beside its parameters."""
    if request_id is not None and not is_label(request_id, MAX_REQUEST_ID_CHARS):
        yield Violation(
            "request_id", f"must be 1 to {MAX_REQUEST_ID_CHARS} visible ASCII characters"
        )
    if cache_salt is not None and len(cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
        yield Violation("cache_salt", f"must be at most {MAX_CACHE_SALT_BYTES} bytes")
    if truncate_prompt_tokens is not None:
        most = MAX_TOKENS if limits.max_model_len is None else limits.max_model_len - 1
        if not 1 <= truncate_prompt_tokens <= most:
            yield Violation("truncate_prompt_tokens", f"must be 1 to {most}")


def check_ids(path: str, ids: Sequence[int], limits: Limits) -> Iterator[Violation]:
    """Checks that every id is below the vocabulary size; names the first that is not."""
    size = limits.vocab_size
    # The maximum first: it is found at C speed, and bad ids are rare.
    if size is not None and len(ids) and max(ids) >= size:
        worst = next(token_id for token_id in ids if token_id >= size)
        yield Violation(path, f"has id {worst}; ids must be below {size}")


def features_asked(
    sampling: pb.SamplingParams,
    response: pb.ResponseOptions,
    structured: pb.StructuredOutput,
    truncate_prompt_tokens: int | None,
) -> list[tuple[str, pb.Feature]]:
    """Lists the fields that need a feature, each with it. Neutral values need none."""
    neutral = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    needs: dict[str, tuple[object, pb.Feature]] = {
        f"sampling.{name}": (_given(sampling, name) not in (None, value), pb.FEATURE_PENALTIES)
        for name, value in neutral.items()
    }
    needs |= {
        "sampling.n": (sampling.n > 1, pb.FEATURE_MULTIPLE_CHOICES),
        "sampling.logit_bias": (sampling.logit_bias, pb.FEATURE_LOGIT_BIAS),
        "sampling.allowed_token_ids": (sampling.allowed_token_ids, pb.FEATURE_ALLOWED_TOKEN_IDS),
        "response.logprobs": (response.HasField("logprobs"), pb.FEATURE_LOGPROBS),
        "response.prompt_logprobs": (
            response.HasField("prompt_logprobs"),
            pb.FEATURE_PROMPT_LOGPROBS,
        ),
        "response.logprob_token_ids": (response.logprob_token_ids, pb.FEATURE_LOGPROB_TOKEN_IDS),
        "response.echo": (response.echo, pb.FEATURE_ECHO),
        "structured_output": (structured.WhichOneof("constraint"), pb.FEATURE_STRUCTURED_OUTPUT),
        "truncate_prompt_tokens": (
            truncate_prompt_tokens is not None,
            pb.FEATURE_TRUNCATE_PROMPT,
        ),
    }
    return [(field, feature) for field, (asked, feature) in needs.items() if asked]


def is_label(value: object, max_chars: int) -> bool:
    """Says whether `value` is a string of 1 to `max_chars` visible ASCII characters."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= max_chars
        and all("!" <= character <= "~" for character in value)
    )


def _given(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _check_count(
    message: Message, prefix: str, name: str, low: int, high: int
) -> Iterator[Violation]:
    value = _given(message, name)
    if value is not None and not low <= value <= high:
        yield Violation(f"{prefix}.{name}", f"must be {low} to {high}")


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
