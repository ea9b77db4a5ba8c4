"""Keyword options of every call, and the requests built from them.

An option that is absent or None is absent on the wire: the server's published default holds. A zero
is a zero. The option names are the contract's field names; `nanoinfer/v1/generation.proto` says
what each means and which values are valid. The server judges values; here only what the wire cannot
carry is refused, with TypeError or ValueError.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeGuard, TypeVar

from google.protobuf.message import Message as ProtoMessage

from nanoinfer.v1 import gateway_pb2, generation_pb2, tokenizer_pb2

Metadata = tuple[tuple[str, str | bytes], ...]
Prompt = str | Sequence[int]
PromptRequest = TypeVar(
    "PromptRequest",
    gateway_pb2.GatewayServiceGenerateRequest,
    gateway_pb2.GatewayServiceGenerateStreamRequest,
)
ChatRequest = TypeVar(
    "ChatRequest",
    gateway_pb2.GatewayServiceChatRequest,
    gateway_pb2.GatewayServiceChatStreamRequest,
)


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
    message = gateway_pb2.GenerationOptions()
    _fill(message, options, skip=("sampling", "stopping", "response", "structured_output"))
    for part in (message.sampling, message.stopping, message.response):
        _fill(part, options)
    _constrain(message.structured_output, options)
    return message


def generate_request(prompt: Prompt, options: Options, kind: type[PromptRequest]) -> PromptRequest:
    """A prompt's request, as text or as ids."""
    settings = generation_options(options)
    if isinstance(prompt, str):
        return kind(text=prompt, options=settings)
    return kind(token_ids=generation_pb2.TokenIds(ids=prompt), options=settings)


def chat_request(
    messages: Sequence[Message], options: Options, kind: type[ChatRequest]
) -> ChatRequest:
    """A conversation's request."""
    return kind(messages=chat_messages(messages), options=generation_options(options))


def count_request(
    text_or_messages: str | Sequence[Message], model: str | None
) -> gateway_pb2.GatewayServiceCountTokensRequest:
    """A request to count."""
    request = gateway_pb2.GatewayServiceCountTokensRequest(model=model)
    if isinstance(text_or_messages, str):
        request.text = text_or_messages
    else:
        request.conversation.messages.extend(chat_messages(text_or_messages))
        request.conversation.SetInParent()
    return request


def is_conversation(prompt: Prompt | Sequence[Message]) -> TypeGuard[Sequence[Message]]:
    """Tells messages from a text or ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def chat_messages(messages: Sequence[Message]) -> list[tokenizer_pb2.ChatMessage]:
    """Messages as the contract has them."""
    if isinstance(messages, str):
        raise TypeError("a conversation is a sequence of {'role', 'content'}, not a string")
    return [_chat_message(message) for message in messages]


def _chat_message(message: Message) -> tokenizer_pb2.ChatMessage:
    content = message["content"]
    texts = [content] if isinstance(content, str) else content
    parts = [tokenizer_pb2.ContentPart(text=text) for text in texts]
    return tokenizer_pb2.ChatMessage(role=message["role"], content=parts)


def _fill(message: ProtoMessage, options: Mapping[str, Any], skip: Sequence[str] = ()) -> None:
    for field in message.DESCRIPTOR.fields:
        value = options.get(field.name)
        if value is None or field.name in skip:
            continue
        try:
            if not field.is_repeated:
                setattr(message, field.name, value)
            elif isinstance(value, Mapping):
                getattr(message, field.name).update(value)
            else:
                getattr(message, field.name).extend([value] if isinstance(value, str) else value)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{field.name}: {error}") from None


def _constrain(message: generation_pb2.StructuredOutput, options: Options) -> None:
    names = ("json_schema", "json_object", "regex", "grammar", "choices")
    given = [name for name in names if options.get(name) not in (None, False)]
    if len(given) > 1:
        raise ValueError(f"at most one shape can be forced, not {' and '.join(given)}")
    if not given:
        return
    schema = options.get("json_schema")
    if options.get("json_object"):
        message.json_object.SetInParent()
    elif (values := options.get("choices")) is not None:
        message.choices.values.extend(values)
        message.choices.SetInParent()
    elif isinstance(schema, Mapping):
        message.json_schema = json.dumps(schema)
    else:
        _fill(message, options, skip=("json_object", "choices"))
