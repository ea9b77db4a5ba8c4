"""What comes back: frozen values, and the assembly of a stream's deltas into one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

from google.protobuf.message import Message

from nanoinfer.v1 import gateway_pb2, generation_pb2

FinishReason = Literal["stop", "length"]
WholeResponse = gateway_pb2.GatewayServiceGenerateResponse | gateway_pb2.GatewayServiceChatResponse
StreamResponse = (
    gateway_pb2.GatewayServiceGenerateStreamResponse | gateway_pb2.GatewayServiceChatStreamResponse
)
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


def whole(response: WholeResponse, request_id: str, trace_id: str | None) -> Completion:
    """Decodes a unary response."""
    choices = []
    for choice in response.choices:
        part = _Part(choice.index)
        part.extend(choice)
        part.finish = choice.finish if choice.HasField("finish") else None
        choices.append(part.choice())
    return _completion(tuple(choices), response.prompt_info, response.summary, request_id, trace_id)


class Assembly:
    """Collects a stream's messages. `until` sees the text so far and ends the stream with True."""

    def __init__(self, until: Callable[[str], bool] | None = None) -> None:
        self.ended = False
        self._until = until
        self._parts: dict[int, _Part] = {}
        self._prompt = generation_pb2.PromptInfo()
        self._summary: generation_pb2.GenerationSummary | None = None

    def feed(self, message: StreamResponse) -> list[Delta]:
        """Takes a message in and returns what it brought, up to where `until` was satisfied."""
        if message.HasField("prompt_info"):
            self._prompt = message.prompt_info
        if message.HasField("summary"):
            self._summary = message.summary
        deltas = []
        for delta in message.deltas:
            part = self._part(delta.index)
            part.extend(delta)
            token_ids, logprobs = tuple(delta.token_ids), decode_logprobs(delta.logprobs)
            deltas.append(Delta(delta.index, delta.text, token_ids, logprobs))
            if self._until is not None and self._until(part.text):
                self.ended = True
                return deltas
        for finish in message.finishes:
            self._part(finish.index).finish = finish
            deltas.append(Delta(finish.index, "", finish_reason=_REASONS.get(finish.reason)))
        return deltas

    def text(self) -> str:
        """The first completion's text so far."""
        return self._parts[0].text if 0 in self._parts else ""

    def completion(self, request_id: str, trace_id: str | None = None) -> Completion:
        """What has arrived so far, by index."""
        choices = tuple(self._parts[index].choice() for index in sorted(self._parts))
        return _completion(choices, self._prompt, self._summary, request_id, trace_id)

    def _part(self, index: int) -> _Part:
        return self._parts.setdefault(index, _Part(index))


@dataclass(slots=True)
class _Part:
    """One completion while it grows."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: generation_pb2.ChoiceFinish | None = None

    @property
    def text(self) -> str:
        if len(self.texts) > 1:
            self.texts = ["".join(self.texts)]
        return self.texts[0] if self.texts else ""

    def extend(self, delta: gateway_pb2.TextDelta | gateway_pb2.Choice) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(decode_logprobs(delta.logprobs))

    def choice(self) -> Choice:
        token_ids, logprobs = tuple(self.token_ids), tuple(self.logprobs)
        if self.finish is None:
            return Choice(self.index, self.text, token_ids=token_ids, logprobs=logprobs)
        kind = self.finish.stop_match.WhichOneof("match")
        match = self.finish.stop_match
        matched = match.stop if kind == "stop" else match.token_id if kind == "token_id" else None
        reason, seed = _REASONS.get(self.finish.reason), self.finish.seed
        return Choice(self.index, self.text, reason, matched, seed, token_ids, logprobs)


def decode_logprobs(
    entries: Iterable[generation_pb2.TokenLogprob | generation_pb2.TopLogprob],
) -> tuple[TokenLogprob, ...]:
    """Decodes log-probabilities, alternatives included."""
    return tuple(
        TokenLogprob(
            entry.token_id,
            entry.token,
            entry.logprob,
            entry.rank,
            decode_logprobs(entry.top) if isinstance(entry, generation_pb2.TokenLogprob) else (),
        )
        for entry in entries
    )


def _completion(
    choices: Sequence[Choice],
    prompt: generation_pb2.PromptInfo,
    summary: generation_pb2.GenerationSummary | None,
    request_id: str,
    trace_id: str | None,
) -> Completion:
    return Completion(
        choices=tuple(choices),
        usage=None if summary is None else _same_fields(Usage, summary.usage),
        timings=None if summary is None else _same_fields(Timings, summary.timings),
        model=None if summary is None else summary.model,
        request_id=(summary.request_id if summary is not None else "") or request_id,
        prompt_tokens=prompt.prompt_tokens,
        prompt_logprobs=decode_logprobs(prompt.prompt_logprobs),
        tokenizer_fingerprint=b"" if summary is None else summary.tokenizer_fingerprint,
        trace_id=trace_id,
    )


def _same_fields(cls: type[Value], message: Message) -> Value:
    return cls(*(getattr(message, item.name) for item in fields(cls)))  # type: ignore[arg-type]
