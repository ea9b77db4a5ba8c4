"""What the waterfall looks like, from spans made by hand."""

from __future__ import annotations

import io
from typing import Any

from nanoinfer.cli.collector import Span
from nanoinfer.cli.waterfall import draw
from rich.console import Console

MS = 1_000_000
GENERATE = "nanoinfer.v1.EngineService/Generate"


def span(
    number: int, parent: int, service: str, name: str, start: float, end: float, **more: Any
) -> Span:
    return Span(
        service=f"nanoinfer-{service}",
        name=name,
        kind=more.pop("kind", "internal"),
        span_id=bytes([number]),
        parent_id=bytes([parent]) if parent else b"",
        start=int(start * MS),
        end=int(end * MS),
        attributes=more.pop("attributes", {}),
        **more,
    )


SPANS = [
    span(7, 5, "engine", "decode", 40, 95),
    span(6, 5, "engine", "prefill", 20, 40, events=((40 * MS, "first_token"),)),
    span(5, 4, "engine", GENERATE, 20, 95, kind="server"),
    span(4, 2, "gateway", GENERATE, 18, 96, kind="client"),
    span(
        2, 1, "gateway", "nanoinfer.v1.GatewayService/ChatStream", 1, 99, kind="server",
        attributes={
            "gen_ai.usage.output_tokens": 34,
            "gen_ai.usage.cache_read.input_tokens": 0,
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.response.time_to_first_chunk": 0.0393,
            "gen_ai.response.id": "not shown",
            "rpc.response.status_code": "OK",
            "server.port": 1,
        },
    ),
    span(3, 2, "gateway", "nanoinfer.v1.TokenizerService/RenderChat", 2, 2.001, kind="client"),
    span(1, 0, "cli", "nanoinfer.v1.GatewayService/ChatStream", 0, 100, kind="client"),
]  # fmt: skip
EXPECTED = """\
client  → GatewayService/ChatStream       ████████████████████████████████████████ 100.0 ms
gateway └ GatewayService/ChatStream       ████████████████████████████████████████  98.0 ms
          │ finish_reasons=stop  time_to_first_chunk=0.0393  output_tokens=34
gateway   ├ → TokenizerService/RenderChat  ▏                                         0.0 ms
gateway   └ → EngineService/Generate             ███████████████████████████████    78.0 ms
engine      └ EngineService/Generate              ██████████████████████████████    75.0 ms
engine        ├ prefill                           ████████                          20.0 ms
              │   first_token at 20.0 ms
engine        └ decode                                    ██████████████████████    55.0 ms
"""


def drawn(spans: list[Span], width: int = 91) -> list[str]:
    output = io.StringIO()
    draw(spans, Console(file=output, width=width, highlight=False))
    return output.getvalue().splitlines()


def test_the_tree_the_bars_and_the_facts() -> None:
    assert drawn(SPANS) == EXPECTED.splitlines()
    assert drawn(list(reversed(SPANS))) == EXPECTED.splitlines()


def test_no_line_is_wider_than_asked_for() -> None:
    facts = {f"nanoinfer.fact{number}": "x" * 20 for number in range(8)}
    deep = [span(n, n - 1, "engine", "n" * 90, n, 100, attributes=facts) for n in range(1, 9)]
    for width in (60, 80, 100, 200):
        assert max(len(line) for line in drawn([*SPANS, *deep], width)) <= width


def test_a_failure_says_its_status() -> None:
    attributes = {"rpc.response.status_code": "CANCELLED", "error.type": "CANCELLED"}
    lines = drawn([span(1, 0, "gateway", "x", 0, 1, attributes=attributes, failed=True)])
    assert "status=CANCELLED" in lines[1]


def test_orphans_stand_at_the_top() -> None:
    lines = drawn([span(5, 9, "engine", "a", 0, 1), span(6, 8, "engine", "b", 1, 2)])
    assert [line.split()[:2] for line in lines] == [["engine", "a"], ["engine", "b"]]


def test_nothing_to_draw() -> None:
    assert drawn([]) == ["no spans"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    attributes = {"nanoinfer.x": "a\x1b[31mb"}
    lines = drawn([span(1, 0, "gateway", "n\x1b[31m", 0, 1, attributes=attributes)])
    assert not any("\x1b" in line for line in lines)


def test_a_trace_that_names_itself_its_parent_is_drawn() -> None:
    lines = drawn([span(1, 2, "engine", "a", 0, 1), span(2, 1, "engine", "b", 0, 1)])
    assert [line.split()[1] for line in lines] == ["a", "└"]
