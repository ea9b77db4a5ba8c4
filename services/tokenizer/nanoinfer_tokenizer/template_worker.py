"""The process in which chat templates run. Started by `template_process`; run as a plain file.

A sandbox keeps a template from the interpreter's internals but not from running for ever or filling
the memory. So this process bounds itself: an alarm ends it, unhandled, when a rendering takes too
long, and its address space is limited. It needs the standard library and jinja2 alone.

Messages are JSON over the connection whose file descriptor is the first argument:
setup {template, variables, timeout, max_characters, max_memory} → {} or {error};
then for each {messages, add_generation_prompt} → {text}, {refused} or {too_big}.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_REASON = 300  # characters of a template's own words that go on


class GenerationTag(Extension):
    """Accepts `{% generation %}` blocks, which mark an assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Gives the block's body as it is."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def template_environment() -> ImmutableSandboxedEnvironment:
    """Builds the environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def render(
    template: jinja2.Template, variables: dict[str, Any], max_characters: int
) -> dict[str, Any]:
    """Renders once. A template that fails on the messages has refused them."""
    pieces: list[str] = []
    room = max_characters
    try:
        for piece in template.generate(**variables):
            room -= len(piece)
            if room < 0:
                return {"too_big": True}
            pieces.append(piece)
    except MemoryError:
        return {"too_big": True}
    except Exception as error:  # whatever a template can raise is its answer to these messages
        return {"refused": f"{type(error).__name__}: {error}"[:_MAX_REASON]}
    return {"text": "".join(pieces)}


def main() -> None:
    """Serves one parent until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(int(sys.argv[1]))
    setup = json.loads(connection.recv_bytes())
    if sys.platform == "linux":  # others refuse this limit or do not keep it
        resource.setrlimit(resource.RLIMIT_AS, (setup["max_memory"],) * 2)
    try:
        template = template_environment().from_string(setup["template"])
    except jinja2.TemplateError as error:
        connection.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    connection.send_bytes(b"{}")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, setup["timeout"])
        answer = render(template, {**setup["variables"], **request}, setup["max_characters"])
        data = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(data)


if __name__ == "__main__":
    main()
