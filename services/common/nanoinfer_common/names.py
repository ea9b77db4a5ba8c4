"""Names that several services share: metadata keys, health names and error reasons.

Names of spans, attributes and metrics stand where they are made: attributes follow OpenTelemetry's
semantic conventions 1.44.0 (`rpc.*`) and the GenAI conventions (`gen_ai.*`); what those lack is
prefixed `nanoinfer.`.
"""

from typing import Final

# Revision of the contract that these services speak, and the oldest that a client may speak.
SCHEMA_REVISION: Final = 1
MIN_CLIENT_REVISION: Final = 1

# Metadata keys
REQUEST_ID: Final = "x-request-id"
TRACE_ID: Final = "x-trace-id"
PRIORITY: Final = "x-nanoinfer-priority"
TENANT: Final = "x-nanoinfer-tenant"
RETRY_PUSHBACK: Final = "grpc-retry-pushback-ms"
STATUS_DETAILS: Final = "grpc-status-details-bin"

# Health names beside "" and the service's full name
LIVENESS: Final = "liveness"
READINESS: Final = "readiness"

# Error reasons (ErrorInfo.reason)
INVALID_SAMPLING_PARAMS: Final = "INVALID_SAMPLING_PARAMS"
INVALID_STOPPING_PARAMS: Final = "INVALID_STOPPING_PARAMS"
INVALID_RESPONSE_OPTIONS: Final = "INVALID_RESPONSE_OPTIONS"
INVALID_STRUCTURED_OUTPUT: Final = "INVALID_STRUCTURED_OUTPUT"
INVALID_PROMPT: Final = "INVALID_PROMPT"
INVALID_MESSAGES: Final = "INVALID_MESSAGES"
INVALID_REQUEST: Final = "INVALID_REQUEST"
INVALID_METADATA: Final = "INVALID_METADATA"
INVALID_TOKEN_IDS: Final = "INVALID_TOKEN_IDS"
INPUT_TOO_LARGE: Final = "INPUT_TOO_LARGE"
ANSWER_TOO_LARGE: Final = "ANSWER_TOO_LARGE"
PROMPT_TOO_LONG: Final = "PROMPT_TOO_LONG"
EXCEEDS_KV_CAPACITY: Final = "EXCEEDS_KV_CAPACITY"
MODEL_NOT_FOUND: Final = "MODEL_NOT_FOUND"
FEATURE_DISABLED: Final = "FEATURE_DISABLED"
UNKNOWN_METHOD: Final = "UNKNOWN_METHOD"
TOKENIZER_MISMATCH: Final = "TOKENIZER_MISMATCH"
NO_CHAT_TEMPLATE: Final = "NO_CHAT_TEMPLATE"
QUEUE_FULL: Final = "QUEUE_FULL"
QUEUE_TIMEOUT: Final = "QUEUE_TIMEOUT"
QUOTA_EXCEEDED: Final = "QUOTA_EXCEEDED"
STREAM_STALLED: Final = "STREAM_STALLED"
NO_ENGINE: Final = "NO_ENGINE"
LOADING: Final = "LOADING"
SHUTTING_DOWN: Final = "SHUTTING_DOWN"
ENGINE_LOST: Final = "ENGINE_LOST"
ENGINE_LOST_MID_STREAM: Final = "ENGINE_LOST_MID_STREAM"
TOKENIZER_UNAVAILABLE: Final = "TOKENIZER_UNAVAILABLE"
TEMPLATE_TIMEOUT: Final = "TEMPLATE_TIMEOUT"
DEADLINE_EXCEEDED: Final = "DEADLINE_EXCEEDED"
CANCELLED: Final = "CANCELLED"
INTERNAL: Final = "INTERNAL"

# Every reason above, for labels that must not grow by what others send
REASONS: Final = frozenset(
    value for name, value in list(globals().items()) if name.isupper() and name == value
)
