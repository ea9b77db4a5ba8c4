"""What the tokenizer accepts: sizes and presence, refused with the field's name."""

from collections.abc import Iterable, Sequence
from itertools import islice

import grpc
from google.protobuf.message import Message as ProtoMessage
from nanoinfer.v1.generation_pb2 import TokenIds
from nanoinfer_common import errors, names
from nanoinfer_common.errors import ServiceError, Violation
from nanoinfer_common.validation import MAX_REPORTED


def given_or(request: ProtoMessage, field: str, default: bool) -> bool:
    """Gives an optional flag's value where the request sets it."""
    return bool(getattr(request, field)) if request.HasField(field) else default


def check_size(field: str, unit: str, number: int, limit: int) -> None:
    """Refuses more than `limit` characters or ids. Raises INPUT_TOO_LARGE."""
    if number <= limit:
        return
    raise ServiceError(
        grpc.StatusCode.INVALID_ARGUMENT,
        names.INPUT_TOO_LARGE,
        f"{field} holds {number} {unit}, more than {limit}",
        metadata={"limit": str(limit), "size": str(number)},
        violations=[Violation(field, f"at most {limit} {unit}")],
    )


def check_text(text: str, max_characters: int) -> None:
    """Refuses an empty text and one that is too long."""
    _refuse_empty([text], ["text"])
    check_size("text", "characters", len(text), max_characters)


def check_texts(texts: Sequence[str], max_texts: int, max_characters: int) -> None:
    """Refuses none or too many texts, empty ones, and more characters than one request may have."""
    if not 1 <= len(texts) <= max_texts:
        violation = Violation("texts", f"1 to {max_texts} texts")
        raise errors.invalid(names.INVALID_PROMPT, "bad number of texts", violation)
    _refuse_empty(texts, (f"texts[{index}]" for index in range(len(texts))))
    check_size("texts", "characters", sum(map(len, texts)), max_characters)


def check_token_ids(tokens: TokenIds, max_ids: int) -> Sequence[int]:
    """Gives the ids; refuses none and too many. The vocabulary knows which ids exist."""
    if not tokens.ids:
        violation = Violation("tokens.ids", "at least one id")
        raise errors.invalid(names.INVALID_TOKEN_IDS, "no token ids", violation)
    check_size("tokens.ids", "ids", len(tokens.ids), max_ids)
    return tokens.ids


def _refuse_empty(texts: Iterable[str], fields: Iterable[str]) -> None:
    empty = (field for text, field in zip(texts, fields, strict=True) if not text)
    violations = [Violation(field, "not empty") for field in islice(empty, MAX_REPORTED)]
    if violations:
        raise errors.invalid(names.INVALID_PROMPT, "an empty text", *violations)
