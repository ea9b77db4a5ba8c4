"""Keyword options of every call, and the message built from them.

An option that is absent or None is absent on the wire: the server's published default holds. A zero
is a zero. The option names are the contract's field names; `nanoinfer/v1/generation.proto` says
what each means and which values are valid. The server judges values; here only what the wire cannot
carry is refused, with TypeError or ValueError.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from google.protobuf.message import Message as ProtoMessage

from nanoinfer.v1 import gateway_pb2

Prompt = str | Sequence[int]


class Message(TypedDict):
    """One message of a conversation; `content` is text, or several pieces of text."""

    role: str
    content: str | Sequence[str]


Messages = Sequence[Message]


class CallOptions(TypedDict, total=False):
    """What every call takes. Beside its type an option has a group and a line of help."""

    timeout: Annotated[float | None, "Request", "Seconds until the request is given up."]
    metadata: Annotated[Mapping[str, str | bytes] | None, "Request", "KEY=VALUE sent along."]
    request_id: Annotated[str | None, "Request", "Label of the request in logs and traces."]
    priority: Annotated[int | None, "Request", "-100 to 100, higher first."]
    tenant: Annotated[str | None, "Request", "Who asks."]


class Options(CallOptions, total=False):
    """What every way of asking for a completion takes; at most one shape may be forced."""

    temperature: Annotated[float | None, "Sampling", "0 is greedy, at most 2."]
    top_p: Annotated[float | None, "Sampling", "Keep the likeliest tokens up to this probability."]
    top_k: Annotated[int | None, "Sampling", "Keep this many tokens; 0 is off."]
    min_p: Annotated[float | None, "Sampling", "Drop tokens below this share of the likeliest one."]
    repetition_penalty: Annotated[float | None, "Sampling", "Above 1 makes repetition less likely."]
    frequency_penalty: Annotated[float | None, "Sampling", "Penalty for each occurrence."]
    presence_penalty: Annotated[float | None, "Sampling", "Penalty for having occurred."]
    no_repeat_ngram_size: Annotated[int | None, "Sampling", "Never repeat so many tokens in a row."]
    seed: Annotated[int | None, "Sampling", "Seed of the random numbers."]
    n: Annotated[int | None, "Sampling", "Number of completions."]
    logit_bias: Annotated[Mapping[int, float] | None, "Sampling", "ID=BIAS added to a logit."]
    allowed_token_ids: Annotated[Sequence[int] | None, "Sampling", "Only these ids."]
    max_tokens: Annotated[int | None, "Stopping", "Most tokens to produce."]
    min_tokens: Annotated[int | None, "Stopping", "Tokens to produce before anything may end it."]
    stop: Annotated[str | Sequence[str] | None, "Stopping", "String that ends the completion."]
    stop_token_ids: Annotated[Sequence[int] | None, "Stopping", "Id that ends the completion."]
    ignore_eos: Annotated[bool | None, "Stopping", "Treat end of sequence as an ordinary token."]
    include_stop_in_output: Annotated[bool | None, "Stopping", "Leave what ended it in the output."]
    logprobs: Annotated[int | None, "Response", "Log-probabilities and this many alternatives."]
    prompt_logprobs: Annotated[int | None, "Response", "The same for the prompt's tokens."]
    logprob_token_ids: Annotated[Sequence[int] | None, "Response", "Report these ids."]
    return_token_ids: Annotated[bool | None, "Response", "Return token ids (with --json)."]
    echo: Annotated[bool | None, "Response", "Put the prompt before the completion."]
    skip_special_tokens: Annotated[bool | None, "Response", "Leave special tokens out of the text."]
    json_schema: Annotated[str | Mapping[str, object] | None, "Shape", "JSON Schema of the output."]
    json_object: Annotated[bool | None, "Shape", "Any JSON object."]
    regex: Annotated[str | None, "Shape", "Regular expression that the output must match."]
    grammar: Annotated[str | None, "Shape", "Grammar in Lark form."]
    choices: Annotated[Sequence[str] | None, "Shape", "String that the output may be."]
    model: Annotated[str | None, "Request", "Name of the served model."]
    parse_special_tokens: Annotated[bool | None, "Request", "Special tokens in a prompt's text."]
    truncate_prompt_tokens: Annotated[int | None, "Request", "Keep this many last prompt ids."]
    cache_salt: Annotated[str | None, "Request", "Separates prefix-cache entries."]


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
