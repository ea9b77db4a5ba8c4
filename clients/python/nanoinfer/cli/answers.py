"""Shows answers: streamed text, JSON, and the conversation on a terminal."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer

from nanoinfer.cli import console
from nanoinfer.client import Client
from nanoinfer.errors import NanoInferError, Unavailable
from nanoinfer.options import Message
from nanoinfer.results import Completion
from nanoinfer.streams import Stream

with suppress(ImportError):  # gives input() line editing; not on every platform
    import_module("readline")


def conversation(text: str, system: str | None) -> list[Message]:
    """A user's message, after a system message where there is one."""
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def open_stream(
    client: Client, prompt: str | Sequence[Message], options: Mapping[str, Any]
) -> Stream:
    """Asks; what the wire cannot carry is a usage error."""
    try:
        return client.stream(prompt, **options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def show(
    client: Client,
    prompt: str | Sequence[Message],
    options: Mapping[str, Any],
    *,
    as_json: bool = False,
) -> Completion:
    """Streams an answer to standard output and returns it; what broke is raised after its text."""
    several = (options.get("n") or 1) > 1
    line_open = False
    stream = open_stream(client, prompt, options)
    with stream, console.Progress("waiting for the answer") as progress:
        try:
            for delta in stream:
                progress.end()
                if delta.text and not (as_json or several):
                    console.write(delta.text)
                    line_open = True
        finally:
            if line_open:
                console.write("\n")
        completion = stream.result()
    if as_json:
        console.write_json(completion)
    elif several:
        for choice in completion.choices:
            console.write(f"--- {choice.index} ---\n{choice.text}\n")
    return completion


class Repl:
    """A conversation over several turns. A turn that fails or is interrupted is forgotten."""

    def __init__(
        self, client: Client, system: str | None, options: Mapping[str, Any], *, as_json: bool
    ) -> None:
        self._client = client
        self._system = system
        self._options = options
        self._as_json = as_json
        self._messages: list[Message] = []

    def run(self) -> None:
        """Reads prompts until the input ends or the gateway is gone."""
        console.note("/clear forgets the conversation, /exit or Ctrl-D ends it")
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                console.write("\n")
                return
            if text == "/exit":
                return
            if text == "/clear":
                self._messages.clear()
            elif text:
                self._turn(text)

    def _turn(self, text: str) -> None:
        system = None if self._messages else self._system
        asked = [*self._messages, *conversation(text, system)]
        try:
            completion = show(self._client, asked, self._options, as_json=self._as_json)
        except KeyboardInterrupt:
            console.note("(interrupted)")
        except Unavailable:
            raise
        except NanoInferError as error:
            console.report(error, self._as_json)
        else:
            self._messages = [*asked, {"role": "assistant", "content": completion.text}]
