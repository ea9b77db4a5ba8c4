"""What was chosen by measuring, kept from one start to the next beside Triton's compiled kernels.

A file is named by a digest of all that the choices depend on: device, libraries, code, shapes. Who
starts with the same measures nothing and runs the same kernels as before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)

Choices = Mapping[str, Mapping[int, Any]]
"""A dataclass of plain fields, or None, by the name of what was tuned and the number of rows."""


def source_digest() -> str:
    """Of this package: another version of a kernel may want another shape."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class ChoiceFile:
    """Reads and writes choices; what cannot be read or written is no error, only measured again."""

    def __init__(self, directory: Path, facts: Mapping[str, object], kinds: Sequence[type]) -> None:
        """`facts` are what the choices depend on, as JSON takes it; `kinds` the dataclasses."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"nanoinfer-choices-{digest[:32]}.json"
        self._kinds = {kind.__name__: kind for kind in kinds}

    def read(self) -> dict[str, dict[int, Any]] | None:
        """None where there is no such file, or none that can be understood."""
        try:
            stored = json.loads(self.path.read_text())
            choices = {
                name: {int(rows): self._decoded(value) for rows, value in chosen.items()}
                for name, chosen in stored.items()
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _LOG.warning("%s cannot be read: %r", self.path, error)
            return None
        _LOG.info("kernels as chosen before: %s", self.path)
        return choices

    def write(self, choices: Choices) -> None:
        """Put the file in its place at once: another process may be reading."""
        stored = {
            name: {rows: _encoded(value) for rows, value in chosen.items()}
            for name, chosen in choices.items()
        }
        directory = self.path.parent
        # under a name of its own first; with the usual mode, for all users of the directory to read
        part = directory / f"{self.path.name}.{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(stored))
            part.replace(self.path)
        except OSError as error:
            _LOG.warning("%s cannot be written: %s", self.path, error)
            with contextlib.suppress(OSError):
                part.unlink()

    def _decoded(self, value: list[Any] | None) -> object:
        if value is None:
            return None
        name, *values = value
        return self._kinds[name](
            *(bytes.fromhex(each["hex"]) if isinstance(each, dict) else each for each in values)
        )


def _encoded(choice: Any) -> list[object] | None:
    if choice is None:
        return None
    values = (getattr(choice, field.name) for field in fields(choice))
    plain = ({"hex": each.hex()} if isinstance(each, bytes) else each for each in values)
    return [type(choice).__name__, *plain]
