from google.api import field_behavior_pb2 as _field_behavior_pb2
from nanoinfer.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdmissionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADMISSION_STATE_UNSPECIFIED: _ClassVar[AdmissionState]
    ADMISSION_STATE_OPEN: _ClassVar[AdmissionState]
    ADMISSION_STATE_FULL: _ClassVar[AdmissionState]
    ADMISSION_STATE_CLOSED: _ClassVar[AdmissionState]
ADMISSION_STATE_UNSPECIFIED: AdmissionState
ADMISSION_STATE_OPEN: AdmissionState
ADMISSION_STATE_FULL: AdmissionState
ADMISSION_STATE_CLOSED: AdmissionState

class EngineServiceGenerateRequest(_message.Message):
    __slots__ = ("prompt", "sampling", "stopping", "response", "structured_output", "request_id", "model", "truncate_prompt_tokens", "cache_salt", "tokenizer_fingerprint", "cancels_at_stop_strings")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CANCELS_AT_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    prompt: _generation_pb2.TokenIds
    sampling: _generation_pb2.SamplingParams
    stopping: _generation_pb2.StoppingParams
    response: _generation_pb2.ResponseOptions
    structured_output: _generation_pb2.StructuredOutput
    request_id: str
    model: str
    truncate_prompt_tokens: int
    cache_salt: str
    tokenizer_fingerprint: bytes
    cancels_at_stop_strings: bool
    def __init__(self, prompt: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[_generation_pb2.StoppingParams, _Mapping]] = ..., response: _Optional[_Union[_generation_pb2.ResponseOptions, _Mapping]] = ..., structured_output: _Optional[_Union[_generation_pb2.StructuredOutput, _Mapping]] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., truncate_prompt_tokens: _Optional[int] = ..., cache_salt: _Optional[str] = ..., tokenizer_fingerprint: _Optional[bytes] = ..., cancels_at_stop_strings: _Optional[bool] = ...) -> None: ...

class EngineServiceGenerateResponse(_message.Message):
    __slots__ = ("prompt_info", "deltas", "finishes", "summary", "first_token_timings")
    PROMPT_INFO_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_TIMINGS_FIELD_NUMBER: _ClassVar[int]
    prompt_info: _generation_pb2.PromptInfo
    deltas: _containers.RepeatedCompositeFieldContainer[TokenDelta]
    finishes: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ChoiceFinish]
    summary: _generation_pb2.GenerationSummary
    first_token_timings: _generation_pb2.Timings
    def __init__(self, prompt_info: _Optional[_Union[_generation_pb2.PromptInfo, _Mapping]] = ..., deltas: _Optional[_Iterable[_Union[TokenDelta, _Mapping]]] = ..., finishes: _Optional[_Iterable[_Union[_generation_pb2.ChoiceFinish, _Mapping]]] = ..., summary: _Optional[_Union[_generation_pb2.GenerationSummary, _Mapping]] = ..., first_token_timings: _Optional[_Union[_generation_pb2.Timings, _Mapping]] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("index", "token_ids", "logprobs")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprob]
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprob, _Mapping]]] = ...) -> None: ...

class EngineServiceGetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineServiceGetModelInfoResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _generation_pb2.ModelInfo
    def __init__(self, model: _Optional[_Union[_generation_pb2.ModelInfo, _Mapping]] = ...) -> None: ...

class EngineServiceGetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineServiceGetLoadResponse(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: EngineLoad
    def __init__(self, load: _Optional[_Union[EngineLoad, _Mapping]] = ...) -> None: ...

class EngineServiceWatchLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineServiceWatchLoadResponse(_message.Message):
    __slots__ = ("load", "max_interval_ms")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    MAX_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    load: EngineLoad
    max_interval_ms: int
    def __init__(self, load: _Optional[_Union[EngineLoad, _Mapping]] = ..., max_interval_ms: _Optional[int] = ...) -> None: ...

class EngineLoad(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "kv_cache_usage", "waiting_prompt_tokens", "admission_state")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_STATE_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    kv_cache_usage: float
    waiting_prompt_tokens: int
    admission_state: AdmissionState
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., kv_cache_usage: _Optional[float] = ..., waiting_prompt_tokens: _Optional[int] = ..., admission_state: _Optional[_Union[AdmissionState, str]] = ...) -> None: ...

class EngineServiceGetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineServiceGetServerInfoResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _generation_pb2.ServerInfo
    def __init__(self, server: _Optional[_Union[_generation_pb2.ServerInfo, _Mapping]] = ...) -> None: ...
