"""Runs `up`'s supervisor over fake services: `python run_stack.py JSON`, flags by service name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nanoinfer.cli.arguments import Ports, StackSettings
from nanoinfer.cli.console import guarded
from nanoinfer.cli.stack import run_until_told
from typer import Exit

FAKE = Path(__file__).with_name("fake_service.py")


def commands(flags: dict[str, list[str]]) -> dict[str, list[str]]:
    """What to start for each service."""
    return {
        name: [sys.executable, str(FAKE), name, *flags.get(name, [])]
        for name in ("tokenizer", "engine", "gateway")
    }


if __name__ == "__main__":
    settings = StackSettings(Path("model"), commands=commands(json.loads(sys.argv[1])))
    try:
        guarded(run_until_told)(settings, Ports(), as_json=False)
    except Exit as ended:
        sys.exit(ended.exit_code)
