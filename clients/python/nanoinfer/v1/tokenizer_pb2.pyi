from google.api import field_behavior_pb2 as _field_behavior_pb2
from nanoinfer.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenizerServiceEncodeRequest(_message.Message):
    __slots__ = ("text", "add_special_tokens", "parse_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARSE_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    add_special_tokens: bool
    parse_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., add_special_tokens: _Optional[bool] = ..., parse_special_tokens: _Optional[bool] = ...) -> None: ...

class TokenizerServiceEncodeResponse(_message.Message):
    __slots__ = ("tokens", "tokenizer_fingerprint")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    tokens: _generation_pb2.TokenIds
    tokenizer_fingerprint: bytes
    def __init__(self, tokens: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., tokenizer_fingerprint: _Optional[bytes] = ...) -> None: ...

class TokenizerServiceEncodeBatchRequest(_message.Message):
    __slots__ = ("texts", "add_special_tokens", "parse_special_tokens")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARSE_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    add_special_tokens: bool
    parse_special_tokens: bool
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., add_special_tokens: _Optional[bool] = ..., parse_special_tokens: _Optional[bool] = ...) -> None: ...

class TokenizerServiceEncodeBatchResponse(_message.Message):
    __slots__ = ("tokens", "tokenizer_fingerprint")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenIds]
    tokenizer_fingerprint: bytes
    def __init__(self, tokens: _Optional[_Iterable[_Union[_generation_pb2.TokenIds, _Mapping]]] = ..., tokenizer_fingerprint: _Optional[bytes] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: _containers.RepeatedCompositeFieldContainer[ContentPart]
    def __init__(self, role: _Optional[str] = ..., content: _Optional[_Iterable[_Union[ContentPart, _Mapping]]] = ...) -> None: ...

class ContentPart(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class TokenizerServiceRenderChatRequest(_message.Message):
    __slots__ = ("messages", "add_generation_prompt", "return_text")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    RETURN_TEXT_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    add_generation_prompt: bool
    return_text: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., add_generation_prompt: _Optional[bool] = ..., return_text: _Optional[bool] = ...) -> None: ...

class TokenizerServiceRenderChatResponse(_message.Message):
    __slots__ = ("tokens", "tokenizer_fingerprint", "text")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    tokens: _generation_pb2.TokenIds
    tokenizer_fingerprint: bytes
    text: str
    def __init__(self, tokens: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., tokenizer_fingerprint: _Optional[bytes] = ..., text: _Optional[str] = ...) -> None: ...

class TokenizerServiceDecodeRequest(_message.Message):
    __slots__ = ("tokens", "skip_special_tokens")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _generation_pb2.TokenIds
    skip_special_tokens: bool
    def __init__(self, tokens: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., skip_special_tokens: _Optional[bool] = ...) -> None: ...

class TokenizerServiceDecodeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class TokenizerServiceDecodeStreamRequest(_message.Message):
    __slots__ = ("tokens", "skip_special_tokens")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _generation_pb2.TokenIds
    skip_special_tokens: bool
    def __init__(self, tokens: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., skip_special_tokens: _Optional[bool] = ...) -> None: ...

class TokenizerServiceDecodeStreamResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class TokenizerServiceGetVocabularyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizerServiceGetVocabularyResponse(_message.Message):
    __slots__ = ("first_token_id", "tokens", "special_token_ids", "vocab_size", "tokenizer_fingerprint", "eos_token_ids", "byte_token_ids", "first_tokens", "strip_leading_spaces")
    class FirstTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: bytes
        def __init__(self, key: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BYTE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STRIP_LEADING_SPACES_FIELD_NUMBER: _ClassVar[int]
    first_token_id: int
    tokens: _containers.RepeatedScalarFieldContainer[bytes]
    special_token_ids: _containers.RepeatedScalarFieldContainer[int]
    vocab_size: int
    tokenizer_fingerprint: bytes
    eos_token_ids: _generation_pb2.TokenIds
    byte_token_ids: _containers.RepeatedScalarFieldContainer[int]
    first_tokens: _containers.ScalarMap[int, bytes]
    strip_leading_spaces: int
    def __init__(self, first_token_id: _Optional[int] = ..., tokens: _Optional[_Iterable[bytes]] = ..., special_token_ids: _Optional[_Iterable[int]] = ..., vocab_size: _Optional[int] = ..., tokenizer_fingerprint: _Optional[bytes] = ..., eos_token_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., byte_token_ids: _Optional[_Iterable[int]] = ..., first_tokens: _Optional[_Mapping[int, bytes]] = ..., strip_leading_spaces: _Optional[int] = ...) -> None: ...

class TokenizerServiceGetTokenizerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizerServiceGetTokenizerInfoResponse(_message.Message):
    __slots__ = ("name", "vocab_size", "special_tokens", "eos_token_ids", "max_characters", "max_batch_texts", "tokenizer_fingerprint", "has_chat_template", "backend")
    class SpecialTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TEXTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    name: str
    vocab_size: int
    special_tokens: _containers.ScalarMap[int, str]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_characters: int
    max_batch_texts: int
    tokenizer_fingerprint: bytes
    has_chat_template: bool
    backend: str
    def __init__(self, name: _Optional[str] = ..., vocab_size: _Optional[int] = ..., special_tokens: _Optional[_Mapping[int, str]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., max_characters: _Optional[int] = ..., max_batch_texts: _Optional[int] = ..., tokenizer_fingerprint: _Optional[bytes] = ..., has_chat_template: _Optional[bool] = ..., backend: _Optional[str] = ...) -> None: ...

class TokenizerServiceGetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizerServiceGetServerInfoResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _generation_pb2.ServerInfo
    def __init__(self, server: _Optional[_Union[_generation_pb2.ServerInfo, _Mapping]] = ...) -> None: ...
