"""JSON files of a model directory, read the same way by every service.

UTF-8 with or without a byte order mark. A file that is none is refused by name.
"""

import json
from pathlib import Path
from typing import Any, Final

MAX_JSON_BYTES: Final = 256 * 1024 * 1024
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"


class JsonFileError(ValueError):
    """A file that holds no JSON object; the message begins with the file's name."""


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object in `file`. Raises JsonFileError, also where there is no such file."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise JsonFileError(f"{file.name} is larger than {MAX_JSON_BYTES} bytes")
        content = file.read_bytes()
        if content.startswith(_LFS_POINTER):
            raise JsonFileError(lfs_message(file))
        value = json.loads(content.decode("utf-8-sig"))
    except JsonFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise JsonFileError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise JsonFileError(f"{file.name} is not a JSON object")
    return value


def read_optional_object(file: Path) -> dict[str, Any]:
    """Returns the object in `file`, an empty one where there is no such file."""
    return read_object(file) if file.is_file() else {}


def is_lfs_pointer(file: Path) -> bool:
    """Whether Git left a pointer in the place of the file, as a clone without Git LFS does."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def lfs_message(file: Path) -> str:
    """Says what to do about a pointer."""
    return f"{file.name} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
