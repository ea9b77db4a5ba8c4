"""What comes back: frozen values, and how the contract's messages read as them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from google.protobuf.message import Message

from nanoinfer.v1 import gateway_pb2, generation_pb2

FinishReason = Literal["stop", "length"]
WholeResponse = gateway_pb2.GatewayServiceGenerateResponse | gateway_pb2.GatewayServiceChatResponse
Value = TypeVar("Value")

_REASONS: dict[int, FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability; `rank` 1 is the likeliest."""

    token_id: int
    token: bytes
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts over all completions."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Nanoseconds per phase, as the server measured them."""

    tokenize_ns: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    detokenize_ns: int
    total_ns: int
    time_to_first_token_ns: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion.

    `finish_reason` is None where the stream was closed or broke before the completion ended.
    `matched` is the stop string or stop id that ended it; None with "stop" means end of sequence.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    matched: str | int | None = None
    seed: int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `usage`, `timings`, `model` are None where a stream did not reach its end."""

    choices: tuple[Choice, ...]
    usage: Usage | None
    timings: Timings | None
    model: str | None
    request_id: str
    prompt_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    tokenizer_fingerprint: bytes = b""
    trace_id: str | None = None

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.choices[0].finish_reason if self.choices else None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one completion of a stream; the last one has `finish_reason` and no text."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


def completion(response: WholeResponse, request_id: str, trace_id: str | None) -> Completion:
    """Decodes a whole response; without a summary it is a stream's that did not reach its end."""
    summary = response.summary if response.HasField("summary") else None
    choices = sorted(response.choices, key=lambda choice: choice.index)
    return Completion(
        choices=tuple(_choice(choice) for choice in choices),
        usage=None if summary is None else _same_fields(Usage, summary.usage),
        timings=None if summary is None else _same_fields(Timings, summary.timings),
        model=None if summary is None else summary.model,
        request_id=response.summary.request_id or request_id,
        prompt_tokens=response.prompt_info.prompt_tokens,
        prompt_logprobs=_logprobs(response.prompt_info.prompt_logprobs),
        tokenizer_fingerprint=response.summary.tokenizer_fingerprint,
        trace_id=trace_id,
    )


def delta(message: gateway_pb2.TextDelta) -> Delta:
    """Decodes new text."""
    token_ids, logprobs = tuple(message.token_ids), _logprobs(message.logprobs)
    return Delta(message.index, message.text, token_ids, logprobs)


def last_delta(finish: generation_pb2.ChoiceFinish) -> Delta:
    """Decodes the end of a completion."""
    return Delta(finish.index, "", finish_reason=_REASONS.get(finish.reason))


def _choice(choice: gateway_pb2.Choice) -> Choice:
    match = choice.finish.stop_match
    kind = match.WhichOneof("match")
    return Choice(
        index=choice.index,
        text=choice.text,
        finish_reason=_REASONS.get(choice.finish.reason),
        matched=match.stop if kind == "stop" else match.token_id if kind == "token_id" else None,
        seed=choice.finish.seed if choice.HasField("finish") else None,
        token_ids=tuple(choice.token_ids),
        logprobs=_logprobs(choice.logprobs),
    )


def _logprobs(
    entries: Iterable[generation_pb2.TokenLogprob | generation_pb2.TopLogprob],
) -> tuple[TokenLogprob, ...]:
    found = []
    for entry in entries:
        top = _logprobs(entry.top) if isinstance(entry, generation_pb2.TokenLogprob) else ()
        found.append(TokenLogprob(entry.token_id, entry.token, entry.logprob, entry.rank, top))
    return tuple(found)


def _same_fields(cls: type[Value], message: Message) -> Value:
    return cls(*(getattr(message, item.name) for item in fields(cls)))  # type: ignore[arg-type]
