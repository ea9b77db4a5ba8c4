"""Requests as the core holds them, and their validation: each request passes here once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from nanoinfer.v1 import gateway_pb2, generation_pb2, tokenizer_pb2
from nanoinfer_common import names
from nanoinfer_common.errors import Code, ServiceError, Violation, invalid
from nanoinfer_common.validation import (
    Limits,
    validate_messages,
    validate_prompt_ids,
    validate_request,
)

from nanoinfer_gateway.core.caller import Caller

BYTES_PER_TOKEN_ID = 4
# A part of a conversation takes at least as much once parsed, be its text empty.
BYTES_PER_PART = 32

Prompt = str | generation_pb2.TokenIds | Sequence[tokenizer_pb2.ChatMessage]


class Models(Protocol):
    """The models that the engines serve."""

    def models(self) -> list[generation_pb2.ModelInfo]:
        """Return one entry a name, sorted by name."""
        ...

    def model(self, name: str | None) -> generation_pb2.ModelInfo:
        """Return a model's description; None means the served one."""
        ...


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's ids; `fingerprint` is the tokenizer's, None where the caller gave the ids.

    `is_whole` is false where ids at its beginning were left out.
    """

    tokens: generation_pb2.TokenIds
    fingerprint: bytes | None = None
    tokenize_ns: int = 0
    is_whole: bool = True

    def last(self, count: int) -> Self:
        """Return the prompt with no more than its last `count` ids; 0 keeps all."""
        if not 0 < count < len(self.tokens.ids):
            return self
        kept = generation_pb2.TokenIds(ids=self.tokens.ids[-count:])
        return replace(self, tokens=kept, is_whole=False)


@dataclass(frozen=True)
class GenerationRequest:
    """A request that is valid. `arrived_ns` is of `time.perf_counter_ns`.

    `parse_special_tokens` reads the text of control tokens in a prompt's text as the tokens;
    `num_bytes` is the prompt's size in memory.
    """

    prompt: Prompt
    options: gateway_pb2.GenerationOptions
    model: generation_pb2.ModelInfo
    caller: Caller
    arrived_ns: int
    parse_special_tokens: bool = False
    num_bytes: int = 0

    @property
    def num_choices(self) -> int:
        """Number of completions."""
        sampling = self.options.sampling
        return sampling.n if sampling.HasField("n") else self.model.default_sampling.n or 1

    @property
    def num_prompt_tokens(self) -> int | None:
        """Number of a prompt's ids where the caller gave them; None for text."""
        return len(self.prompt.ids) if isinstance(self.prompt, generation_pb2.TokenIds) else None

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return not isinstance(self.prompt, str | generation_pb2.TokenIds)


class RequestReader:
    """Early validation of what the engine validates again, with the limits that it published."""

    def __init__(self, models: Models, max_prompt_bytes: int) -> None:
        self._models = models
        self._max_prompt_bytes = max_prompt_bytes

    def generation(
        self,
        prompt: Prompt,
        options: gateway_pb2.GenerationOptions,
        caller: Caller,
        *,
        parse_special_tokens: bool = False,
    ) -> GenerationRequest:
        """Validate everything; raises what the contract says for each kind of fault."""
        arrived_ns = time.perf_counter_ns()
        _refuse_parsing(prompt, parse_special_tokens)
        try:
            model = self._models.model(options.model if options.HasField("model") else None)
        except ServiceError:
            self._validate(prompt, options, Limits())  # a bad field is told first
            raise
        num_bytes = self._validate(prompt, options, Limits.of(model))
        return GenerationRequest(
            prompt, options, model, caller, arrived_ns, parse_special_tokens, num_bytes
        )

    def prompt_bytes(
        self, prompt: Prompt, model: str | None, *, parse_special_tokens: bool = False
    ) -> int:
        """Validate a prompt that is only counted, and the name of its model; return its size."""
        _refuse_parsing(prompt, parse_special_tokens)
        _validate_form(prompt, Limits())
        num_bytes = self._num_bytes(prompt)
        if model is not None:
            self._models.model(model)
        return num_bytes

    def _validate(
        self, prompt: Prompt, options: gateway_pb2.GenerationOptions, limits: Limits
    ) -> int:
        """Check options and prompt; return the prompt's size."""
        validate_request(options, limits)
        kept = prompt
        # Without a model the number of ids kept is bounded by nothing, and none is looked at.
        if isinstance(prompt, generation_pb2.TokenIds) and limits.max_model_len is not None:
            kept = EncodedPrompt(prompt).last(options.truncate_prompt_tokens).tokens
        _validate_form(kept, limits)
        return self._num_bytes(prompt)

    def _num_bytes(self, prompt: Prompt) -> int:
        """Return a prompt's size in bytes, 4 for an id, 32 for a part besides its text.

        Raises INVALID_ARGUMENT: INPUT_TOO_LARGE for more text than one request may bring.
        """
        if isinstance(prompt, generation_pb2.TokenIds):
            return len(prompt.ids) * BYTES_PER_TOKEN_ID
        size = len(prompt.encode()) if isinstance(prompt, str) else _conversation_bytes(prompt)
        limit = self._max_prompt_bytes
        if size > limit:
            field = "prompt" if isinstance(prompt, str) else "messages"
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                names.INPUT_TOO_LARGE,
                f"the {field} has {size} bytes; one request takes {limit}",
                metadata={"maxBytes": str(limit)},
                violations=[Violation(field, f"must be at most {limit} bytes")],
            )
        return size


def _refuse_parsing(prompt: Prompt, parse_special_tokens: bool) -> None:
    """Raise INVALID_ARGUMENT where special tokens are to be parsed in something but text."""
    if parse_special_tokens and not isinstance(prompt, str):
        is_ids = isinstance(prompt, generation_pb2.TokenIds)
        given = "token_ids" if is_ids else "a conversation"
        violation = Violation("parse_special_tokens", f"is for text, not for {given}")
        raise invalid(names.INVALID_PROMPT, "parse_special_tokens is for text", violation)


def _validate_form(prompt: Prompt, limits: Limits) -> None:
    if isinstance(prompt, generation_pb2.TokenIds):
        validate_prompt_ids(prompt.ids, limits)
    elif isinstance(prompt, str):
        if not prompt:
            violation = Violation("prompt", "must not be empty")
            raise invalid(names.INVALID_PROMPT, "prompt must not be empty", violation)
    else:
        validate_messages(prompt)


def _conversation_bytes(messages: Sequence[tokenizer_pb2.ChatMessage]) -> int:
    num_parts = sum(len(message.content) for message in messages)
    return num_parts * BYTES_PER_PART + sum(
        len(message.role.encode()) + sum(len(part.text.encode()) for part in message.content)
        for message in messages
    )
