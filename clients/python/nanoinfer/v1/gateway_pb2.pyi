from google.api import field_behavior_pb2 as _field_behavior_pb2
from nanoinfer.v1 import generation_pb2 as _generation_pb2
from nanoinfer.v1 import tokenizer_pb2 as _tokenizer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerationOptions(_message.Message):
    __slots__ = ("sampling", "stopping", "stop", "response", "structured_output", "request_id", "model", "truncate_prompt_tokens", "cache_salt")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    sampling: _generation_pb2.SamplingParams
    stopping: _generation_pb2.StoppingParams
    stop: _containers.RepeatedScalarFieldContainer[str]
    response: _generation_pb2.ResponseOptions
    structured_output: _generation_pb2.StructuredOutput
    request_id: str
    model: str
    truncate_prompt_tokens: int
    cache_salt: str
    def __init__(self, sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[_generation_pb2.StoppingParams, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ..., response: _Optional[_Union[_generation_pb2.ResponseOptions, _Mapping]] = ..., structured_output: _Optional[_Union[_generation_pb2.StructuredOutput, _Mapping]] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., truncate_prompt_tokens: _Optional[int] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class GatewayServiceGenerateRequest(_message.Message):
    __slots__ = ("text", "token_ids", "options", "parse_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PARSE_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _generation_pb2.TokenIds
    options: GenerationOptions
    parse_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., options: _Optional[_Union[GenerationOptions, _Mapping]] = ..., parse_special_tokens: _Optional[bool] = ...) -> None: ...

class GatewayServiceGenerateResponse(_message.Message):
    __slots__ = ("choices", "prompt_info", "summary")
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INFO_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    prompt_info: _generation_pb2.PromptInfo
    summary: _generation_pb2.GenerationSummary
    def __init__(self, choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., prompt_info: _Optional[_Union[_generation_pb2.PromptInfo, _Mapping]] = ..., summary: _Optional[_Union[_generation_pb2.GenerationSummary, _Mapping]] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("index", "text", "token_ids", "logprobs", "finish")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprob]
    finish: _generation_pb2.ChoiceFinish
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprob, _Mapping]]] = ..., finish: _Optional[_Union[_generation_pb2.ChoiceFinish, _Mapping]] = ...) -> None: ...

class GatewayServiceGenerateStreamRequest(_message.Message):
    __slots__ = ("text", "token_ids", "options", "parse_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PARSE_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _generation_pb2.TokenIds
    options: GenerationOptions
    parse_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., options: _Optional[_Union[GenerationOptions, _Mapping]] = ..., parse_special_tokens: _Optional[bool] = ...) -> None: ...

class GatewayServiceGenerateStreamResponse(_message.Message):
    __slots__ = ("prompt_info", "deltas", "finishes", "summary")
    PROMPT_INFO_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    prompt_info: _generation_pb2.PromptInfo
    deltas: _containers.RepeatedCompositeFieldContainer[TextDelta]
    finishes: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ChoiceFinish]
    summary: _generation_pb2.GenerationSummary
    def __init__(self, prompt_info: _Optional[_Union[_generation_pb2.PromptInfo, _Mapping]] = ..., deltas: _Optional[_Iterable[_Union[TextDelta, _Mapping]]] = ..., finishes: _Optional[_Iterable[_Union[_generation_pb2.ChoiceFinish, _Mapping]]] = ..., summary: _Optional[_Union[_generation_pb2.GenerationSummary, _Mapping]] = ...) -> None: ...

class TextDelta(_message.Message):
    __slots__ = ("index", "text", "token_ids", "logprobs")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprob]
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprob, _Mapping]]] = ...) -> None: ...

class GatewayServiceChatRequest(_message.Message):
    __slots__ = ("messages", "options")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_tokenizer_pb2.ChatMessage]
    options: GenerationOptions
    def __init__(self, messages: _Optional[_Iterable[_Union[_tokenizer_pb2.ChatMessage, _Mapping]]] = ..., options: _Optional[_Union[GenerationOptions, _Mapping]] = ...) -> None: ...

class GatewayServiceChatResponse(_message.Message):
    __slots__ = ("choices", "prompt_info", "summary")
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INFO_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    prompt_info: _generation_pb2.PromptInfo
    summary: _generation_pb2.GenerationSummary
    def __init__(self, choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., prompt_info: _Optional[_Union[_generation_pb2.PromptInfo, _Mapping]] = ..., summary: _Optional[_Union[_generation_pb2.GenerationSummary, _Mapping]] = ...) -> None: ...

class GatewayServiceChatStreamRequest(_message.Message):
    __slots__ = ("messages", "options")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_tokenizer_pb2.ChatMessage]
    options: GenerationOptions
    def __init__(self, messages: _Optional[_Iterable[_Union[_tokenizer_pb2.ChatMessage, _Mapping]]] = ..., options: _Optional[_Union[GenerationOptions, _Mapping]] = ...) -> None: ...

class GatewayServiceChatStreamResponse(_message.Message):
    __slots__ = ("prompt_info", "deltas", "finishes", "summary")
    PROMPT_INFO_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    prompt_info: _generation_pb2.PromptInfo
    deltas: _containers.RepeatedCompositeFieldContainer[TextDelta]
    finishes: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ChoiceFinish]
    summary: _generation_pb2.GenerationSummary
    def __init__(self, prompt_info: _Optional[_Union[_generation_pb2.PromptInfo, _Mapping]] = ..., deltas: _Optional[_Iterable[_Union[TextDelta, _Mapping]]] = ..., finishes: _Optional[_Iterable[_Union[_generation_pb2.ChoiceFinish, _Mapping]]] = ..., summary: _Optional[_Union[_generation_pb2.GenerationSummary, _Mapping]] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_tokenizer_pb2.ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[_tokenizer_pb2.ChatMessage, _Mapping]]] = ...) -> None: ...

class GatewayServiceCountTokensRequest(_message.Message):
    __slots__ = ("text", "conversation", "model", "parse_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PARSE_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    conversation: Conversation
    model: str
    parse_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., conversation: _Optional[_Union[Conversation, _Mapping]] = ..., model: _Optional[str] = ..., parse_special_tokens: _Optional[bool] = ...) -> None: ...

class GatewayServiceCountTokensResponse(_message.Message):
    __slots__ = ("num_tokens",)
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ...) -> None: ...

class GatewayServiceListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class GatewayServiceListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ModelInfo]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[_generation_pb2.ModelInfo, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GatewayServiceGetModelInfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GatewayServiceGetModelInfoResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _generation_pb2.ModelInfo
    def __init__(self, model: _Optional[_Union[_generation_pb2.ModelInfo, _Mapping]] = ...) -> None: ...

class GatewayServiceGetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GatewayServiceGetServerInfoResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _generation_pb2.ServerInfo
    def __init__(self, server: _Optional[_Union[_generation_pb2.ServerInfo, _Mapping]] = ...) -> None: ...
