"""The list of models, page by page (AIP-158)."""

import base64
import binascii
from collections.abc import Sequence

from nanoinfer.v1 import generation_pb2
from nanoinfer_common import names
from nanoinfer_common.errors import ServiceError, Violation, invalid

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 100
_TOKEN_PREFIX = "models-after:"


def list_page(
    models: Sequence[generation_pb2.ModelInfo], page_size: int, page_token: str
) -> tuple[list[generation_pb2.ModelInfo], str]:
    """Return a page of models, which come sorted by name, and the next page's token or "".

    Raises INVALID_ARGUMENT for a negative size and a token that this service did not make.
    """
    if page_size < 0:
        raise _invalid("page_size", "must not be negative")
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    last_name = _parse(page_token) if page_token else ""
    rest = [model for model in models if model.id > last_name]
    page = rest[:size]
    return page, _token(page[-1].id) if len(rest) > size else ""


def _token(last_name: str) -> str:
    return base64.urlsafe_b64encode(f"{_TOKEN_PREFIX}{last_name}".encode()).decode()


def _parse(page_token: str) -> str:
    try:
        text = base64.b64decode(page_token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    if not text.startswith(_TOKEN_PREFIX):
        raise _invalid("page_token", "must be one that this service gave")
    return text.removeprefix(_TOKEN_PREFIX)


def _invalid(field: str, description: str) -> ServiceError:
    violation = Violation(field, description)
    return invalid(names.INVALID_REQUEST, f"{field} {description}", violation)
