"""What the verbs write: text, JSON, errors, progress; and which exit code an error has."""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, Self

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.status import Status

from nanoinfer import errors

_INVALID = (
    errors.InvalidRequest,
    errors.NotFound,
    errors.PreconditionFailed,
    errors.TooLarge,
    errors.Unsupported,
)
_EXIT_CODES: dict[type[errors.NanoInferError], int] = {
    **dict.fromkeys(_INVALID, 4),
    **{errors.Unavailable: 3, errors.Overloaded: 5, errors.DeadlineExceeded: 124},
}


class CommandError(Exception):
    """A verb cannot go on; the message says why. Exit code 1."""


class Progress(Status):
    """Says what takes long: a spinner on a terminal, elsewhere a line for each new text."""

    def __init__(self, text: str) -> None:
        super().__init__(text, console=Console(stderr=True))
        self._said = text

    def say(self, text: str) -> None:
        """Changes the text."""
        if self.console.is_terminal:
            self.update(text)
        elif text != self._said:
            note(text)
        self._said = text

    def __enter__(self) -> Self:
        self.start()
        return self


def write(text: str) -> None:
    """Writes to standard output at once; on a terminal without control characters."""
    if sys.stdout is None:
        return
    if sys.stdout.isatty():
        text = "".join(c for c in text if c.isprintable() or c in "\n\t")
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Writes a line to standard error, where there is one."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def show(text: str, value: object, as_json: bool) -> None:
    """Writes the text, or the value as one line of JSON, where bytes become hexadecimal."""
    write((json.dumps(value, default=_plain, ensure_ascii=False) if as_json else text) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return MessageToDict(value, preserving_proto_field_name=True)
    return value.hex() if isinstance(value, bytes) else asdict(value)


def report(error: errors.NanoInferError, as_json: bool) -> None:
    """Writes an error for people to standard error, and as JSON to standard output if asked."""
    note(f"nanoinfer: {error}")
    for violation in error.violations:
        note(f"  {violation.field}: {violation.description}")
    if error.retry_after is not None:
        note(f"  try again in {error.retry_after:g} s")
    if as_json:
        described = {item.name: getattr(error, item.name) for item in fields(error)}
        del described["partial"]
        show("", {"error": described | {"code": error.code.name}}, as_json)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Makes usage errors of options and texts that the wire cannot carry."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turns exceptions of a verb into a line on standard error and the exit code."""

    @functools.wraps(command)
    def wrapper(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except errors.NanoInferError as error:
            report(error, bool(options.get("json")))
            raise typer.Exit(_EXIT_CODES.get(type(error), 1)) from None
        except CommandError as error:
            note(f"nanoinfer: {error}")
            raise typer.Exit(1) from None

    return wrapper
