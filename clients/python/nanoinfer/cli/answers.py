"""Shows answers: streamed text, JSON, and the conversation on a terminal."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from nanoinfer.cli import console
from nanoinfer.cli.sampling import chat_options
from nanoinfer.client import Client
from nanoinfer.errors import NanoInferError, Unavailable
from nanoinfer.options import Message, Messages
from nanoinfer.results import Completion
from nanoinfer.streams import Stream

with suppress(ImportError):  # gives input() line editing; not on every platform
    import_module("readline")


def conversation(text: str, system: str | None) -> list[Message]:
    """A user's message, after a system message where there is one."""
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def open_stream(client: Client, prompt: str | Messages, options: Mapping[str, Any]) -> Stream:
    """Asks; what the wire cannot carry is a usage error."""
    with console.usage_errors():
        return client.stream(prompt, **options)


def show(
    client: Client, prompt: str | Messages, options: Mapping[str, Any], as_json: bool
) -> Completion:
    """Streams an answer to standard output and returns it; what broke is raised after its text."""
    several = (options.get("n") or 1) > 1
    stream = open_stream(client, prompt, options)
    with stream, console.Progress("waiting for the answer") as progress:
        try:
            for delta in stream:
                progress.stop()
                if not (as_json or several):
                    console.write(delta.text)
        finally:
            if stream.text and not (as_json or several):
                console.write("\n")
        completion = stream.result()
    if as_json or several:
        parts = [f"--- {choice.index} ---\n{choice.text}" for choice in completion.choices]
        console.show("\n".join(parts), completion, as_json)
    return completion


def converse(client: Client, system: str | None, options: Mapping[str, Any], as_json: bool) -> None:
    """Holds a conversation until the input ends or the gateway is gone; says how it samples.

    A turn that fails or is interrupted is forgotten.
    """
    options = chat_options(client, options, always_shown=True)
    console.note("/clear forgets the conversation, /exit or Ctrl-D ends it")
    messages: list[Message] = []
    while (text := _line()) != "/exit":
        if text in ("", "/clear"):
            messages = [] if text else messages
            continue
        asked = [*messages, *conversation(text, None if messages else system)]
        try:
            completion = show(client, asked, options, as_json)
        except KeyboardInterrupt:
            console.note("(interrupted)")
        except Unavailable:
            raise
        except NanoInferError as error:
            console.report(error, as_json)
        else:
            messages = [*asked, {"role": "assistant", "content": completion.text}]


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        console.write("\n")
        return "/exit"
