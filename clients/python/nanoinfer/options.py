"""Keyword options of every call, and the message built from them.

An option that is absent or None is absent on the wire: the server's published default holds. A zero
is a zero. The option names are the contract's field names; `nanoinfer/v1/generation.proto` says
what each means and which values are valid. The server judges values; here only what the wire cannot
carry is refused, with TypeError or ValueError.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf.message import Message as ProtoMessage

from nanoinfer.v1 import gateway_pb2

Prompt = str | Sequence[int]


class Message(TypedDict):
    """One message of a conversation; `content` is text, or several pieces of text."""

    role: str
    content: str | Sequence[str]


class CallOptions(TypedDict, total=False):
    """What every call takes: `timeout` in seconds, `metadata` sent beside the request."""

    timeout: float | None
    metadata: Mapping[str, str | bytes] | None
    request_id: str | None
    priority: int | None
    tenant: str | None


class Options(CallOptions, total=False):
    """What every way of asking for a completion takes; at most one shape may be forced."""

    # sampling
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    n: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    # stopping
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_in_output: bool | None
    # response
    logprobs: int | None
    prompt_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    return_token_ids: bool | None
    echo: bool | None
    skip_special_tokens: bool | None
    # shape
    json_schema: str | Mapping[str, object] | None
    json_object: bool | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None
    # envelope
    model: str | None
    truncate_prompt_tokens: int | None
    cache_salt: str | None


def check_names(options: Mapping[str, object], known: type) -> None:
    """Raises TypeError for an option that does not exist."""
    if unknown := sorted(set(options) - known.__optional_keys__):  # type: ignore[attr-defined]
        raise TypeError(f"unknown option: {', '.join(unknown)}")


def generation_options(options: Options) -> gateway_pb2.GenerationOptions:
    """The contract's message; nothing in it is set that `options` leaves out."""
    check_names(options, Options)
    message = gateway_pb2.GenerationOptions()
    for part in (message, message.sampling, message.stopping, message.response):
        _fill(part, options)
    _fill(message.structured_output, _shape(options))
    return message


def _shape(options: Options) -> dict[str, object]:
    """The one forced shape, as the contract's field has it."""
    schema, choices = options.get("json_schema"), options.get("choices")
    shapes: dict[str, object] = {
        "json_schema": json.dumps(schema) if isinstance(schema, Mapping) else schema,
        "json_object": {} if options.get("json_object") else None,
        "regex": options.get("regex"),
        "grammar": options.get("grammar"),
        "choices": None if choices is None else {"values": choices},
    }
    given = [name for name, value in shapes.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"at most one shape can be forced, not {' and '.join(given)}")
    return shapes


def _fill(message: ProtoMessage, options: Mapping[str, Any]) -> None:
    for field in message.DESCRIPTOR.fields:
        value = options.get(field.name)
        if value is None:
            continue
        if field.is_repeated and isinstance(value, str):
            value = [value]
        try:
            message.MergeFrom(type(message)(**{field.name: value}))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{field.name}: {error}") from None
