"""Loading shows a bar to people at a terminal, and lines to everybody else."""

from __future__ import annotations

import io
import sys

import pytest
from nanoinfer_engine.core.progress import LoadProgress
from nanoinfer_engine.server import loading
from nanoinfer_engine.server.loading import show_loading
from structlog.testing import capture_logs

GIGA = 10**9
REPORTS = [
    LoadProgress(0, 4 * GIGA, 1, 2),
    LoadProgress(1 * GIGA, 4 * GIGA, 1, 2),
    LoadProgress(3 * GIGA, 4 * GIGA, 2, 2),
    LoadProgress(4 * GIGA, 4 * GIGA, 2, 2),
]


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool = True) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Screen())
    show = show_loading("console")
    with capture_logs() as lines:
        for report in REPORTS:
            show(report)
    last = sys.stderr.getvalue().rpartition("\r")[2]  # type: ignore[attr-defined]
    assert "weights, shard 2/2 100% |" in last
    assert "4.00G of 4.00G" in last
    assert last.rstrip().endswith("B/s")
    assert lines == []


@pytest.mark.parametrize(("log_format", "is_terminal"), [("json", True), ("console", False)])
def test_others_get_a_line_a_second(
    log_format: str, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(loading.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", Screen(is_terminal))
    show = show_loading(log_format)
    with capture_logs() as lines:
        for report in REPORTS:
            show(report)
            now += 0.75
    assert [(line["percent"], line["shard"]) for line in lines] == [(75, "2/2"), (100, "2/2")]
    assert lines[-1]["gigabytes_per_second"] == pytest.approx(4 / 2.25, abs=0.01)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
