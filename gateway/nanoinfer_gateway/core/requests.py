"""From the contract's requests to a validated generation request."""

import time
from collections.abc import Sequence
from typing import Any

import grpc
from nanoinfer.v1 import gateway_pb2, generation_pb2, tokenizer_pb2
from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError, Violation, invalid
from nanoinfer_common.validation import (
    Limits,
    RequestMetadata,
    read_metadata,
    validate_messages,
    validate_prompt_ids,
    validate_request,
)

from nanoinfer_gateway.core.generation import GenerationRequest, Prompt
from nanoinfer_gateway.settings import GatewaySettings
from nanoinfer_gateway.upstreams.replicas import Replicas
from nanoinfer_gateway.upstreams.routing import Call, EncodedPrompt

BYTES_PER_TOKEN_ID = 4
# A part of a conversation takes at least as much once parsed, be its text empty.
BYTES_PER_PART = 32

PromptRequest = (
    gateway_pb2.GatewayServiceGenerateRequest | gateway_pb2.GatewayServiceGenerateStreamRequest
)


def prompt_of(request: PromptRequest) -> Prompt:
    """Return the prompt that is set, an empty text where none is.

    Raises INVALID_ARGUMENT for ids with an option that is about text.
    """
    if request.WhichOneof("prompt") == "token_ids":
        refuse_parsing(request, "token_ids")
        return request.token_ids
    return request.text


def refuse_parsing(
    request: PromptRequest | gateway_pb2.GatewayServiceCountTokensRequest, given: str
) -> None:
    """Raise INVALID_ARGUMENT where special tokens are to be parsed in something but `text`."""
    if request.parse_special_tokens:
        violation = Violation("parse_special_tokens", f"is for text, not for {given}")
        raise invalid(names.INVALID_PROMPT, "parse_special_tokens is for text", violation)


class RequestReader:
    """Validates early what the engine validates again, with the limits that it published."""

    def __init__(self, settings: GatewaySettings, replicas: Replicas) -> None:
        self._settings = settings
        self._replicas = replicas

    def metadata(self, context: Any, request_id: str | None = None) -> tuple[RequestMetadata, Call]:
        """Read a call's metadata and deadline, and what of it goes on upstream."""
        metadata = read_metadata(context.invocation_metadata(), request_id)
        forwarded = [
            (names.REQUEST_ID, metadata.request_id),
            (names.PRIORITY, str(metadata.priority)),
        ]
        if metadata.tenant is not None:
            forwarded.append((names.TENANT, metadata.tenant))
        remaining = context.time_remaining()
        if remaining is None:
            remaining = self._settings.default_deadline_seconds
        seconds = min(remaining, self._settings.max_deadline_seconds)
        return metadata, Call(tuple(forwarded), time.monotonic() + seconds)

    def generation(
        self,
        prompt: Prompt,
        options: gateway_pb2.GenerationOptions,
        context: Any,
        arrived_ns: int,
        *,
        parse_special_tokens: bool = False,
    ) -> tuple[GenerationRequest, RequestMetadata]:
        """Validate everything; raises what the contract says for each kind of fault."""
        given_id = options.request_id if options.HasField("request_id") else None
        try:
            model = self._replicas.model(options.model if options.HasField("model") else None)
        except ServiceError:
            self._validate(prompt, options, Limits())  # a bad field is told first
            raise
        self._validate(prompt, options, Limits.of(model))
        metadata, call = self.metadata(context, given_id)
        request = GenerationRequest(
            prompt,
            options,
            model,
            metadata.request_id,
            call,
            arrived_ns,
            parse_special_tokens=parse_special_tokens,
        )
        return request, metadata

    def num_bytes(self, prompt: Prompt) -> int:
        """Return a prompt's size in bytes, 4 for an id, 32 for a part besides its text.

        Raises INVALID_ARGUMENT: INPUT_TOO_LARGE for more text than one request may bring.
        """
        if isinstance(prompt, generation_pb2.TokenIds):
            return len(prompt.ids) * BYTES_PER_TOKEN_ID
        size = len(prompt.encode()) if isinstance(prompt, str) else _conversation_bytes(prompt)
        limit = self._settings.max_request_prompt_bytes
        if size > limit:
            field = "prompt" if isinstance(prompt, str) else "messages"
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                names.INPUT_TOO_LARGE,
                f"the {field} has {size} bytes; one request takes {limit}",
                metadata={"maxBytes": str(limit)},
                violations=[Violation(field, f"must be at most {limit} bytes")],
            )
        return size

    def validate_prompt(self, prompt: Prompt, limits: Limits) -> None:
        """Check a prompt's form and size."""
        if isinstance(prompt, generation_pb2.TokenIds):
            validate_prompt_ids(prompt.ids, limits)
        elif isinstance(prompt, str):
            if not prompt:
                violation = Violation("prompt", "must not be empty")
                raise invalid(names.INVALID_PROMPT, "prompt must not be empty", violation)
        else:
            validate_messages(prompt)
        self.num_bytes(prompt)

    def _validate(
        self, prompt: Prompt, options: gateway_pb2.GenerationOptions, limits: Limits
    ) -> None:
        validate_request(options, limits)
        # Without a model the number of ids kept is bounded by nothing, and none is looked at.
        if isinstance(prompt, generation_pb2.TokenIds) and limits.max_model_len is not None:
            prompt = EncodedPrompt(prompt).last(options.truncate_prompt_tokens).tokens
        self.validate_prompt(prompt, limits)


def _conversation_bytes(messages: Sequence[tokenizer_pb2.ChatMessage]) -> int:
    num_parts = sum(len(message.content) for message in messages)
    return num_parts * BYTES_PER_PART + sum(
        len(message.role.encode()) + sum(len(part.text.encode()) for part in message.content)
        for message in messages
    )
