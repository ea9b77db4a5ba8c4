"""The one validator of requests. The gateway runs it for early answers, the engine for truth.

Protobuf lets NaN, infinities, unknown enum values and absurd counts pass; here they end with
INVALID_ARGUMENT and one `BadRequest.field_violations` entry a field. An unset field is never
checked: it means the model's default. What is valid but beyond the server's features ends with
UNIMPLEMENTED, so that nothing is ever accepted and ignored.
"""

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer.v1 import tokenizer_pb2

from nanoinfer_common import errors, field_checks, names, telemetry
from nanoinfer_common.errors import ServiceError, Violation
from nanoinfer_common.field_checks import MAX_REQUEST_ID_CHARS, ParameterMessage
from nanoinfer_common.field_checks import Limits as Limits

MAX_MESSAGES: Final = 10_000
# In a whole conversation: an empty part takes 2 bytes, so the size of a message bounds nothing.
MAX_CONTENT_PARTS: Final = 20_000
MAX_ROLE_BYTES: Final = 64
# More than this many bad messages are not told one by one.
MAX_REPORTED: Final = 8
# What a value must match, and how that is told.
_METADATA: Final = {
    names.REQUEST_ID: (
        f"[!-~]{{1,{MAX_REQUEST_ID_CHARS}}}",
        f"must be 1 to {MAX_REQUEST_ID_CHARS} visible ASCII characters",
    ),
    names.PRIORITY: ("[+-]?(0?[0-9]{1,2}|100)", "must be an integer from -100 to 100"),
    names.TENANT: ("[!-~]{1,64}", "must be 1 to 64 visible ASCII characters"),
}

_REASONS: Final = {
    "sampling": names.INVALID_SAMPLING_PARAMS,
    "stopping": names.INVALID_STOPPING_PARAMS,
    "stop": names.INVALID_STOPPING_PARAMS,
    "response": names.INVALID_RESPONSE_OPTIONS,
    "structured_output": names.INVALID_STRUCTURED_OUTPUT,
    "prompt": names.INVALID_PROMPT,
    "messages": names.INVALID_MESSAGES,
}


@dataclass(frozen=True)
class RequestMetadata:
    """What a call's metadata says about it."""

    request_id: str
    priority: int = 0
    tenant: str | None = None


def validate_request(request: ParameterMessage, limits: Limits) -> None:
    """Checks everything but the prompt; unset fields are fine.

    Raises INVALID_ARGUMENT with all violations at once; only then UNIMPLEMENTED (FEATURE_DISABLED)
    for features that `limits` lacks.
    """
    _raise_any(field_checks.check_all(request, limits))
    if limits.features is None:
        return
    asked = field_checks.features_asked(request)
    lacking = [(field, feature) for field, feature in asked if feature not in limits.features]
    if lacking:
        fields = ", ".join(field for field, _ in lacking)
        field, feature = lacking[0]
        message = f"not available on this server: {fields}"
        raise errors.unimplemented(message, pb.Feature.Name(feature), field)


def validate_prompt_ids(ids: Sequence[int], limits: Limits) -> None:
    """Checks a prompt given as ids: 1 to max_model_len - 1 of them, each below the vocabulary.

    Raises INVALID_ARGUMENT: PROMPT_TOO_LONG, or INVALID_PROMPT.
    """
    if not len(ids):
        _raise_any([Violation("prompt", "must not be empty")])
    longest = limits.max_model_len
    if longest is not None and len(ids) >= longest:
        raise ServiceError(
            grpc.StatusCode.INVALID_ARGUMENT,
            names.PROMPT_TOO_LONG,
            f"the prompt has {len(ids)} tokens; the model takes {longest - 1}",
            metadata={"promptTokens": str(len(ids)), "maxModelLen": str(longest)},
        )
    _raise_any(field_checks.check_ids("prompt", ids, limits))


def validate_messages(messages: Sequence[tokenizer_pb2.ChatMessage]) -> None:
    """Checks a conversation's form: 1 to 10,000 messages, each with a role and set parts.

    The number of parts is checked before any of them is looked at.

    Raises INVALID_ARGUMENT (INVALID_MESSAGES). Which roles exist, the chat template knows.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        _raise_any([Violation("messages", f"must be 1 to {MAX_MESSAGES} messages")])
    if sum(len(message.content) for message in messages) > MAX_CONTENT_PARTS:
        _raise_any([Violation("messages", f"must have at most {MAX_CONTENT_PARTS} parts in all")])
    violations: list[Violation] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if not 0 < len(message.role.encode()) <= MAX_ROLE_BYTES:
            violations.append(Violation(f"{path}.role", f"must be 1 to {MAX_ROLE_BYTES} bytes"))
        if not message.content:
            violations.append(Violation(f"{path}.content", "must have at least one part"))
        elif not all(part.WhichOneof("part") for part in message.content):
            violations.append(Violation(f"{path}.content", "has a part of no known kind"))
        if len(violations) >= MAX_REPORTED:
            break
    _raise_any(violations)


def read_metadata(
    invocation_metadata: Iterable[Any] | None, request_id: str | None = None
) -> RequestMetadata:
    """Reads request id, priority and tenant, and labels the running RPC with the id.

    The id is the request's own field, or else `x-request-id`, or else the running RPC's, or a UUID.
    Raises INVALID_ARGUMENT (INVALID_METADATA) for a value out of range or given twice.
    """
    values: dict[str, list[str]] = {key: [] for key in _METADATA}
    for key, value in invocation_metadata or ():
        if key in values:
            values[key].append(value)
    violations = []
    for key, given in values.items():
        pattern, rule = _METADATA[key]
        if len(given) > 1:
            violations.append(Violation(key, "must be given once"))
        elif given and not re.fullmatch(pattern, given[0]):
            violations.append(Violation(key, rule))
    if violations:
        raise _invalid(names.INVALID_METADATA, violations)
    label, priority, tenant = (given[0] if given else None for given in values.values())
    chosen = request_id or label or telemetry.request_id() or str(uuid.uuid4())
    telemetry.set_request_id(chosen)
    return RequestMetadata(chosen, int(priority or 0), tenant)


def _raise_any(violations: Iterable[Violation]) -> None:
    found = list(violations)
    if found:
        top = re.split(r"[.\[]", found[0].field)[0]
        raise _invalid(_REASONS.get(top, names.INVALID_REQUEST), found)


def _invalid(reason: str, violations: list[Violation]) -> ServiceError:
    field, description = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return errors.invalid(reason, f"{field} {description}{more}", *violations)
