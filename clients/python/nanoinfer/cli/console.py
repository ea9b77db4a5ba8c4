"""What the verbs write: text, JSON, errors, progress; and which exit code an error has."""

import functools
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn, Self

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.status import Status

from nanoinfer import errors

PROGRESS_AFTER_SECONDS = 1.0
TERMINATED = 143
_EXIT_CODES: tuple[tuple[type[errors.NanoInferError], int], ...] = (
    (errors.Unavailable, 3),
    (errors.InvalidRequest, 4),
    (errors.NotFound, 4),
    (errors.Unsupported, 4),
    (errors.PreconditionFailed, 4),
    (errors.Overloaded, 5),
    (errors.DeadlineExceeded, 124),
)


class CommandError(Exception):
    """A verb cannot go on; the message says why. Exit code 1."""


def exit_code(error: errors.NanoInferError) -> int:
    """The exit code that stands for an error."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)


def write(text: str) -> None:
    """Writes to standard output at once; on a terminal without control characters."""
    if sys.stdout is None:
        return
    if sys.stdout.isatty():
        text = "".join(c for c in text if c.isprintable() or c in "\n\t")
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Writes a line to standard error."""
    print(text, file=sys.stderr, flush=True)


def write_json(value: object) -> None:
    """Writes one line of JSON; bytes become hexadecimal."""
    write(json.dumps(_plain(value), ensure_ascii=False) + "\n")


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Message):
        return MessageToDict(value, preserving_proto_field_name=True)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.hex() if isinstance(value, bytes) else value


def refuse(error: errors.NanoInferError, as_json: bool = False) -> NoReturn:
    """Reports an error and ends with its exit code."""
    report(error, as_json)
    raise typer.Exit(exit_code(error))


def report(error: errors.NanoInferError, as_json: bool = False) -> None:
    """Writes an error for people to standard error, and as JSON to standard output if asked."""
    note(f"nanoinfer: {error}")
    for violation in error.violations:
        note(f"  {violation.field}: {violation.description}")
    if error.retry_after is not None:
        note(f"  try again in {error.retry_after:g} s")
    if as_json:
        described = {
            "code": error.code.name,
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "violations": [asdict(violation) for violation in error.violations],
            "retry_after": error.retry_after,
            "request_id": error.request_id,
            "trace_id": error.trace_id,
        }
        write_json({"error": described})


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """Turns exceptions of a verb into a line on standard error and the exit code."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except errors.NanoInferError as error:
            refuse(error, bool(options.get("json")))
        except CommandError as error:
            note(f"nanoinfer: {error}")
            raise typer.Exit(1) from None

    return guarded


class Progress:
    """Says on standard error what takes longer than a second.

    On a terminal it is a spinner that vanishes; elsewhere a line for each new text.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._status: Status | None = None
        self._shown = self._ended = False
        self._timer = threading.Timer(PROGRESS_AFTER_SECONDS, self._show)
        self._timer.daemon = True

    def say(self, text: str) -> None:
        """Changes the text."""
        with self._lock:
            changed, self._text = text != self._text, text
            if self._status is not None:
                self._status.update(text)
            elif self._shown and changed:
                note(text)

    def end(self) -> None:
        """Takes the spinner away."""
        self._timer.cancel()
        with self._lock:
            if self._status is not None:
                self._status.stop()
            self._status, self._shown, self._ended = None, False, True

    def _show(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._shown = True
            console = Console(stderr=True)
            if console.is_terminal:
                self._status = console.status(self._text)
                self._status.start()
            else:
                note(self._text)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
