"""The process in which chat templates run. Started by `template_process`; run as a plain file.

A sandbox keeps a template from the interpreter's internals but not from running for ever or filling
the memory. So this process bounds itself: an alarm ends it, unhandled, when a rendering takes too
long, and its address space is limited. It needs the standard library and jinja2 alone.

In messages some characters are stand-ins for others (see `guard`). Where the template compares,
searches or splits a text, stand-ins count as what they stand for, but they stay in what comes out:
so the template sees what was written, and what was written stays marked.

Messages are JSON over the connection whose file descriptor is the first argument:
setup {template, variables, timeout, max_characters, max_memory} → {} or {error};
then for each {variables, stand_ins} → {text}, {refused} or {too_big}.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
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


class StandIns:
    """Operations on text in which stand-ins count as the characters that they stand for.

    One character stands for one, so places in a text and in what was written are the same.
    """

    def __init__(self) -> None:
        """Starts without stand-ins."""
        self.table: dict[str, str] = {}
        self.methods = {
            **dict.fromkeys(_SEARCHES, self._search),
            **dict.fromkeys(("split", "rsplit"), self._split),
            **dict.fromkeys(("partition", "rpartition"), self._partition),
            **dict.fromkeys(("strip", "lstrip", "rstrip"), self.strip),
            **dict.fromkeys(("removeprefix", "removesuffix"), self._remove),
            "replace": self._replace,
        }

    def written(self, value: Any) -> Any:
        """Gives a text, or a list of texts, as it was written."""
        if isinstance(value, str):
            for stand_in, character in self.table.items():
                value = value.replace(stand_in, character)
        elif self.table and type(value) in (list, tuple):
            return type(value)(map(self.written, value))
        return value

    def strip(self, name: str, text: str, chars: str | None = None) -> str:
        """Strips `chars` from the ends that the method `name` is about."""
        written, chars = self.written(text), self.written(chars)
        start = 0 if name == "rstrip" else len(written) - len(written.lstrip(chars))
        end = len(written) if name == "lstrip" else len(written.rstrip(chars))
        return text[start : max(start, end)]

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        """Replaces `old`, written in whatever way."""
        if not (old := self.written(old)):
            return text.replace(old, new, count)
        return new.join(_cut(text, self.written(text).split(old, count), len(old)))

    def _replace(self, _: str, text: str, *args: Any) -> str:
        return self.replace(text, *args)

    def _search(self, name: str, text: str, *args: Any) -> Any:
        return getattr(self.written(text), name)(*map(self.written, args))

    def _split(self, name: str, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        if sep is None:  # white space has no stand-ins
            return list(getattr(text, name)(None, maxsplit))
        sep = self.written(sep)
        return _cut(text, getattr(self.written(text), name)(sep, maxsplit), len(sep))

    def _partition(self, name: str, text: str, sep: str) -> tuple[str, ...]:
        return tuple(_cut(text, getattr(self.written(text), name)(self.written(sep))))

    def _remove(self, name: str, text: str, affix: str) -> str:
        length = len(getattr(self.written(text), name)(self.written(affix)))
        return text[:length] if name == "removesuffix" else text[len(text) - length :]


_SEARCHES = ("startswith", "endswith", "find", "rfind", "index", "rindex", "count")


def _cut(text: str, pieces: Iterable[str], gap: int = 0) -> list[str]:
    """Cuts `text` into the lengths of `pieces`, leaving `gap` characters out between them."""
    cut, place = [], 0
    for piece in pieces:
        cut.append(text[place : place + len(piece)])
        place += len(piece) + gap
    return cut


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for."""

    def __init__(self) -> None:
        """Offers what templates expect, with every comparison looking through stand-ins."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            finalize=self._shown,
        )
        written, self.stand_ins = self._as_written, StandIns()
        self.filters["tojson"] = self._to_json
        self.filters["as_written"] = written
        self.filters["trim"] = lambda value, chars=None: self.stand_ins.strip(
            "strip", str(value), chars
        )
        self.filters["replace"] = lambda value, old, new, count=-1: self.stand_ins.replace(
            str(value), str(old), str(new), count
        )
        tests: dict[str, Callable[..., bool]] = self.tests  # type: ignore[assignment]
        for name in _COMPARING:
            tests[name] = partial(_compare, tests[name], written)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Gives an attribute; methods of text look through stand-ins."""
        looks = bool(self.stand_ins.table) and isinstance(obj, str)
        if looks and (method := self.stand_ins.methods.get(attribute)):
            return partial(method, attribute, obj)
        return super().getattr(obj, attribute)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parses a template and lets its comparisons take texts as they were written."""
        tree = super()._parse(source, name, filename)
        for comparison in list(tree.find_all(nodes.Compare)):
            comparison.expr = self._compared(comparison.expr)
            for operand in comparison.ops:
                operand.expr = self._compared(operand.expr)
        return tree

    def _compared(self, node: nodes.Expr) -> nodes.Expr:
        if isinstance(node, nodes.Const):
            return node
        place = {"lineno": node.lineno, "environment": self}
        return nodes.Filter(node, "as_written", [], [], None, None, **place)

    def _as_written(self, value: Any) -> Any:
        return self.stand_ins.written(value)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes for HTML.
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return self._unescaped(text, json.dumps) if ensure_ascii else text

    def _shown(self, value: Any) -> Any:
        """Gives what an expression puts out; a list, say, shows its texts escaped."""
        return value if isinstance(value, str) else self._unescaped(str(value), repr)

    def _unescaped(self, text: str, escape: Callable[[str], str]) -> str:
        """Puts stand-ins back where they were escaped: what they stand for would not have been."""
        for stand_in in self.stand_ins.table:
            text = text.replace(escape(stand_in)[1:-1], stand_in)
        return text


# Tests that compare a value with another one.
_COMPARING = frozenset({"in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "gt", ">", "le", "ge"})


def _compare(test: Callable[..., bool], written: Callable[[Any], Any], *values: Any) -> bool:
    return test(*map(written, values))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def render(
    template: jinja2.Template, variables: dict[str, Any], max_characters: int, stand_ins: StandIns
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
        reason = stand_ins.written(f"{type(error).__name__}: {error}")
        return {"refused": reason[:_MAX_REASON]}
    return {"text": "".join(pieces)}


def main() -> None:
    """Serves one parent until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(int(sys.argv[1]))
    setup = json.loads(connection.recv_bytes())
    if sys.platform == "linux":  # others refuse this limit or do not keep it
        resource.setrlimit(resource.RLIMIT_AS, (setup["max_memory"],) * 2)
    environment = ChatEnvironment()
    try:
        template = environment.from_string(setup["template"])
    except Exception as error:  # besides jinja2's own, the compiler's: too deep, too big
        reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
        connection.send_bytes(json.dumps({"error": reason}).encode())
        return
    connection.send_bytes(b"{}")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, setup["timeout"])
        environment.stand_ins.table = request["stand_ins"]
        variables = {**setup["variables"], **request["variables"]}
        answer = render(template, variables, setup["max_characters"], environment.stand_ins)
        data = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(data)


if __name__ == "__main__":
    main()
