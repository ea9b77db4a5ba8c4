"""Draws a trace: one row a span, as a tree, with its service, a bar on the common time axis, its
duration, and below it the attributes and events worth reading."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nanoinfer.cli.collector import Span

PLAIN_WIDTH = 100
_STYLES = {"client": "white", "gateway": "cyan", "tokenizer": "green", "engine": "magenta"}
_SHOWN = ("gen_ai.usage.", "gen_ai.response.", "gen_ai.request.", "nanoinfer.", "error.")
_NOT_SHOWN = ("gen_ai.response.id", "nanoinfer.request.id", "gen_ai.response.model")


@dataclass(frozen=True)
class _Row:
    span: Span
    lead: str  # what draws the tree before the name
    below: str  # the same for the lines under it


def draw(spans: Sequence[Span], console: Console) -> None:
    """Prints the waterfall; spans whose parent is missing stand at the top level."""
    if not spans:
        console.print("no spans")
        return
    start = min(span.start for span in spans)
    total = max(max(span.end for span in spans) - start, 1)
    rows = list(_rows(spans))
    width = max(console.width, 60)
    service_width = max(len(_service(row.span)) for row in rows)
    name_width = min(max(len(row.lead + _name(row.span)) for row in rows), width // 2)
    bar_width = width - service_width - name_width - len(_milliseconds(total)) - 3
    for row in rows:
        line = Text(_service(row.span).ljust(service_width + 1), style=_style(row.span))
        line.append(_fit(row.lead + _name(row.span), name_width), style="bold")
        line.append(" ")
        line.append(_bar(row.span, start, total, bar_width), style=_style(row.span))
        line.append(
            _milliseconds(row.span.end - row.span.start).rjust(len(_milliseconds(total)) + 1)
        )
        _print(console, line, width)
        indent = " " * (service_width + 1) + row.below
        for text in _wrapped(list(_facts(row.span)), width - len(indent)):
            _print(console, Text(indent + text, style="dim"), width)


def _print(console: Console, line: Text, width: int) -> None:
    line.truncate(width)
    line.rstrip()
    console.print(line, no_wrap=True, overflow="crop", crop=False, soft_wrap=True)


def _rows(spans: Sequence[Span]) -> Iterator[_Row]:
    ordered = sorted(spans, key=lambda span: (span.start, -span.end))
    known = {span.span_id for span in spans}
    children: dict[bytes, list[Span]] = {}
    for span in ordered:
        children.setdefault(span.parent_id, []).append(span)
    seen: set[bytes] = set()
    tops = [span for span in ordered if span.parent_id not in known]
    for top in (*tops, *ordered):  # the second time for spans that name each other as parents
        pending = [(top, "", "")]
        while pending:
            span, lead, below = pending.pop()
            if span.span_id in seen:
                continue
            seen.add(span.span_id)
            inner = [] if not span.span_id else children.get(span.span_id, [])
            yield _Row(span, lead, below + ("│ " if inner else "  "))
            for child in reversed(inner):
                mark, line = ("└ ", "  ") if child is inner[-1] else ("├ ", "│ ")
                pending.append((child, below + mark, below + line))


def _service(span: Span) -> str:
    name = _plain(span.service).removeprefix("nanoinfer-")
    return "client" if name == "cli" else name


def _style(span: Span) -> str:
    return "red" if span.failed else _STYLES.get(_service(span), "yellow")


def _name(span: Span) -> str:
    name = _plain(span.name).removeprefix("nanoinfer.v1.")
    return f"→ {name}" if span.kind == "client" else name


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def _bar(span: Span, start: int, total: int, width: int) -> str:
    """The span's part of the axis; the shortest one still is a mark."""
    first = min(round((span.start - start) / total * width), width - 1)
    last = max(round((span.end - start) / total * width), first)
    return (" " * first + ("█" * (last - first) or "▏")).ljust(width)


def _milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.1f} ms"


def _facts(span: Span) -> Iterator[str]:
    code = span.attributes.get("rpc.response.status_code")
    if code not in (None, "OK"):
        yield f"status={code}"
    for key, value in sorted(span.attributes.items()):
        if key.startswith(_SHOWN) and key not in _NOT_SHOWN and value not in (0, code):
            yield f"{_short(key)}={_plain(value)}"
    for time, name in span.events:
        yield f"{name} at {_milliseconds(time - span.start)}"


def _short(key: str) -> str:
    for prefix in ("gen_ai.usage.", "gen_ai.response.", "gen_ai.", "nanoinfer."):
        key = key.removeprefix(prefix)
    return key


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_plain(entry) for entry in value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else "?" for c in text)


def _wrapped(facts: Sequence[str], width: int) -> Iterator[str]:
    line = ""
    for fact in facts:
        if line and len(line) + 2 + len(fact) > width:
            yield line
            line = fact
        else:
            line = f"{line}  {fact}" if line else fact
    if line:
        yield line
