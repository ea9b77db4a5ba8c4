"""Draws a trace: one row a span, as a tree, with its service, a bar on the common time axis, its
duration, and below it the attributes and events worth reading."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from nanoinfer.cli.collector import Span

PLAIN_WIDTH = 100
_STYLES = {"client": "white", "gateway": "cyan", "tokenizer": "green", "engine": "magenta"}
_SHOWN = ("gen_ai.usage.", "gen_ai.response.", "gen_ai.request.", "nanoinfer.", "error.")
_NOT_SHOWN = ("gen_ai.response.id", "nanoinfer.request.id", "gen_ai.response.model")


def draw(spans: Sequence[Span], console: Console) -> None:
    """Prints the waterfall; spans whose parent is missing stand at the top level."""
    if not spans:
        console.print("no spans")
        return
    start = min(span.start for span in spans)
    total = max(max(span.end for span in spans) - start, 1)
    rows = list(_rows(spans))
    width = max(console.width, 60)
    service_width = max(len(_service(span)) for span in spans) + 1
    name_width = min(max(len(lead + _name(span)) for span, lead, _ in rows), width // 2)
    time_width = len(_milliseconds(total)) + 1
    bar_width = width - service_width - name_width - time_width - 1
    for span, lead, below in rows:
        style = "red" if span.failed else _STYLES.get(_service(span), "yellow")
        name = Text(lead + _name(span), style="bold")
        name.truncate(name_width, overflow="ellipsis", pad=True)
        line = Text(_service(span).ljust(service_width), style=style).append_text(name)
        line.append(f" {_bar(span, start, total, bar_width)}", style=style)
        line.append(_milliseconds(span.end - span.start).rjust(time_width))
        _print(console, line, width)
        indent = " " * service_width + below
        for text in _wrapped(_facts(span), width - len(indent)):
            _print(console, Text(indent + text, style="dim"), width)


def _print(console: Console, line: Text, width: int) -> None:
    line.truncate(width)
    line.rstrip()
    console.print(line, soft_wrap=True)


def _rows(spans: Sequence[Span]) -> Iterator[tuple[Span, str, str]]:
    """Each span with what draws the tree before its name, and before the lines under it."""
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
            inner = children.get(span.span_id, []) if span.span_id else []
            yield span, lead, below + ("│ " if inner else "  ")
            for child in reversed(inner):
                mark, line = ("└ ", "  ") if child is inner[-1] else ("├ ", "│ ")
                pending.append((child, below + mark, below + line))


def _service(span: Span) -> str:
    name = _plain(span.service).removeprefix("nanoinfer-")
    return "client" if name == "cli" else name


def _name(span: Span) -> str:
    name = _plain(span.name).removeprefix("nanoinfer.v1.")
    return f"→ {name}" if span.kind == "client" else name


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
            for prefix in ("gen_ai.usage.", "gen_ai.response.", "gen_ai.", "nanoinfer."):
                key = key.removeprefix(prefix)
            yield f"{key}={_plain(value)}"
    for time, name in span.events:
        yield f"{name} at {_milliseconds(time - span.start)}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_plain(entry) for entry in value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else "?" for c in text)


def _wrapped(facts: Iterator[str], width: int) -> Iterator[str]:
    line = next(facts, "")
    for fact in facts:
        if len(line) + 2 + len(fact) > width:
            yield line
            line = fact
        else:
            line = f"{line}  {fact}"
    if line:
        yield line
