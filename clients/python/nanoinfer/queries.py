"""What each method of the clients asks for, and how the response reads; both clients share it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage

from nanoinfer import options
from nanoinfer.options import CallOptions, Message, Messages, Options, Prompt
from nanoinfer.results import Completion, completion
from nanoinfer.v1 import gateway_pb2
from nanoinfer.v1.generation_pb2 import ModelInfo, ServerInfo

Result = TypeVar("Result")
_BYTES = bytes | bytearray | memoryview  # iterables of int, yet no token ids


@dataclass(frozen=True)
class Query(Generic[Result]):
    """A call to make: `decode` reads its response, given the request's id and the trace's."""

    method: str
    request: ProtoMessage
    settings: CallOptions
    decode: Callable[[Any, str, str | None], Result]


def generate(prompt: Prompt, settings: Options) -> Query[Completion]:
    """Completes a prompt."""
    kind = gateway_pb2.GatewayServiceGenerateRequest
    return _generation("Generate", kind, _prompt(prompt), settings)


def chat(messages: Messages, settings: Options) -> Query[Completion]:
    """Answers a conversation."""
    kind = gateway_pb2.GatewayServiceChatRequest
    return _generation("Chat", kind, {"messages": _messages(messages)}, settings)


def stream(prompt: Prompt | Messages, settings: Options) -> Query[Completion]:
    """Streams the answer to a conversation, where messages are given, else to a prompt."""
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        messages = {"messages": _messages(cast(Messages, prompt))}
        kind = gateway_pb2.GatewayServiceChatStreamRequest
        return _generation("ChatStream", kind, messages, settings)
    whole = gateway_pb2.GatewayServiceGenerateStreamRequest
    return _generation("GenerateStream", whole, _prompt(cast(Prompt, prompt)), settings)


def count_tokens(
    text_or_messages: str | Messages, model: str | None, settings: CallOptions
) -> Query[int]:
    """Counts the tokens of a text or a conversation."""
    request = gateway_pb2.GatewayServiceCountTokensRequest(model=model)
    if isinstance(text_or_messages, str):
        request.text = text_or_messages
    else:
        messages: Any = {"messages": _messages(text_or_messages)}
        request.conversation.MergeFrom(gateway_pb2.Conversation(**messages))
        request.conversation.SetInParent()
    return _plain("CountTokens", request, settings, lambda response: int(response.num_tokens))


def models(page_token: str, settings: CallOptions) -> Query[tuple[list[ModelInfo], str]]:
    """One page of the served models, and the token of the next page, empty at the end."""
    request = gateway_pb2.GatewayServiceListModelsRequest(page_token=page_token)
    return _plain(
        "ListModels", request, settings, lambda page: (list(page.models), page.next_page_token)
    )


def model_info(model: str | None, settings: CallOptions) -> Query[ModelInfo]:
    """Describes a model."""
    request = gateway_pb2.GatewayServiceGetModelInfoRequest(model=model)
    return _plain("GetModelInfo", request, settings, lambda response: response.model)


def server_info(settings: CallOptions) -> Query[ServerInfo]:
    """Describes the gateway."""
    request = gateway_pb2.GatewayServiceGetServerInfoRequest()
    return _plain("GetServerInfo", request, settings, lambda response: response.server)


def _generation(
    method: str, kind: Callable[..., ProtoMessage], prompt: Mapping[str, Any], settings: Options
) -> Query[Completion]:
    parses = settings.get("parse_special_tokens")
    if parses is not None:
        if "messages" in prompt:
            raise TypeError("parse_special_tokens is for prompts, not for conversations")
        prompt = {**prompt, "parse_special_tokens": parses}
    request = kind(**prompt, options=options.generation_options(settings))
    return Query(method, request, settings, completion)


def _plain(
    method: str, request: ProtoMessage, settings: CallOptions, read: Callable[[Any], Result]
) -> Query[Result]:
    options.check_names(settings, CallOptions)
    return Query(method, request, settings, lambda response, *_: read(response))


def check_batch(prompts: Iterable[Prompt], max_concurrency: int) -> None:
    """Raises TypeError for one prompt in place of several, ValueError for no concurrency."""
    if isinstance(prompts, str | _BYTES):
        raise TypeError(f"prompts are a sequence of prompts, not {type(prompts).__name__}")
    if max_concurrency < 1:
        raise ValueError("max_concurrency must be at least 1")


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    if not isinstance(prompt, Iterable) or isinstance(prompt, _BYTES | Mapping):
        raise TypeError(f"a prompt is text or token ids, not {type(prompt).__name__}")
    return {"token_ids": {"ids": prompt}}


def _messages(messages: Messages) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        raise TypeError("a conversation is a sequence of {'role', 'content'}, not a string")
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"a message is {{'role', 'content'}}, not {type(message).__name__}")
    if wrong := sorted(map(str, set(message) ^ {"role", "content"})):
        raise TypeError(f"a message is {{'role', 'content'}}; unknown or missing: {wrong}")
    content = message["content"]
    if not isinstance(content, Iterable):
        raise TypeError(f"content is text, or pieces of text, not {type(content).__name__}")
    texts = [content] if isinstance(content, str | Mapping) else list(content)
    for text in texts:
        if not isinstance(text, str):
            what = list(text) if isinstance(text, Mapping) else type(text).__name__
            raise TypeError(f"content is text, or pieces of text, not {what}")
    return {"role": message["role"], "content": [{"text": text} for text in texts]}
