"""Number of replicas for a load, and the engines' autoscaling: the tables of docs/scaling.md.

python -m benchmarks.scale
python -m benchmarks.scale --rate 300 --prompt-tokens 800 --completion-tokens 200
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from nanoinfer_engine.core.config import EngineConfig

from benchmarks.scale.autoscaler import Rules, Settings
from benchmarks.scale.engines import Profile, Workload, cost
from benchmarks.scale.simulation import Installation, Simulation, outcome

OBJECTIVE = 1.0  # seconds to the first token
CHAT = Workload(512, 256)
LONG = Workload(1024, 2048)
ENGINES = {"guide, CPU": "guide-cpu", "0.6B, H200": "0.6b-h200", "8B, H200": "8b-h200"}
SERVICES = ("gateway", "tokenizer", "engine")
CELL_ENGINES = 64
BYTES_PER_TOKEN = 4
CPU_REQUEST = 0.5  # of gateways and tokenizers in deploy/k8s/base
LOAD_REPORTS = 10  # of an engine to each gateway, in a second
MAX_MESSAGES = EngineConfig.max_messages_per_second


def plan(profile: Profile, work: Workload, rate: float) -> dict[str, int]:
    """Replicas of each service, and cells, for a rate: each at its autoscaler's target."""
    settings = {service: Settings.load(service) for service in SERVICES}
    engines = rate / profile.capacity(work, int(settings["engine"].targets["running"]))
    reports = min(math.ceil(engines), CELL_ENGINES) * LOAD_REPORTS * cost("load_report")
    messages = min(rate * (work.completion_tokens - 1), engines * MAX_MESSAGES)
    gateway_cores = rate * cost("gateway_request") + messages * cost("gateway_message")
    text = work.prompt_tokens * BYTES_PER_TOKEN * cost("tokenizer_byte")
    tokenizer_cores = rate * (cost("tokenizer_request") + text)
    wanted = {
        "gateway": gateway_cores / (settings["gateway"].targets["cpu"] * CPU_REQUEST - reports),
        "tokenizer": tokenizer_cores / (settings["tokenizer"].targets["cpu"] * CPU_REQUEST),
        "engine": engines,
    }
    found = {s: max(settings[s].min_replicas, math.ceil(wanted[s])) for s in SERVICES}
    return {**found, "cells": math.ceil(found["engine"] / CELL_ENGINES)}


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [header, "|".join(["", *["---"] * (header.count("|") - 1), ""])]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def plan_table(rates: Iterable[float], work: Workload) -> str:
    """Replicas by rate, for each engine."""
    rows = []
    for rate in rates:
        plans = [plan(Profile(name), work, rate) for name in ENGINES.values()]
        rows.append([f"{rate:,g}", *(" / ".join(f"{n:,}" for n in p.values()) for p in plans)])
    return table(f"| requests/s | {' | '.join(ENGINES)} |", rows)


def step(time: float) -> float:
    """A load that jumps from 5 to 17 requests a second for 20 minutes, and back."""
    return 17.0 if 300 <= time < 1500 else 5.0


def day(time: float) -> float:
    """A day's curve between 3 and 17 requests a second, squeezed into two hours."""
    return 10.0 - 7.0 * math.cos(2 * math.pi * time / 7200)


def scaling_row(
    name: str, installed: Installation, rate: Callable[[float], float], seconds: int
) -> list[object]:
    """One scenario: the users' view, the changes of direction, the cost."""
    simulation = Simulation(installed)
    simulation.run(rate, 17, seconds)
    seen = outcome(simulation, OBJECTIVE)
    sizes = np.diff(simulation.sizes)
    turns = int((np.diff(np.sign(sizes)) != 0).sum())
    recovered = f"{max(seen.last_bad - 300, 0):,.0f} s" if rate is step else "–"
    shares = f"{seen.over:.1%} ({seen.refused:.1%})"
    hours = f"{simulation.engine_seconds / 3600:.1f}"
    return [name, shares, f"{seen.p99:.1f} s", recovered, turns, max(simulation.sizes), hours]


def scaling_table() -> str:
    """The engines' autoscaler under a step and over a day."""
    hpa = Installation(Profile("8b-h200"), LONG, 2, Settings.load("engine"))
    cautious = Rules(30, (("Percent", 50, 60), ("Pods", 2, 60)))
    careful = replace(hpa, settings=replace(Settings.load("engine"), up=cautious))
    header = "| | over 1 s (of them refused) | TTFT p99 | recovered after | turns | engines, most"
    rows = [
        scaling_row("fixed at 8 engines", replace(hpa, engines=8, settings=None), step, 2700),
        scaling_row("as deployed", hpa, step, 2700),
        scaling_row("engines start in 5 min", replace(hpa, start_seconds=300.0), step, 2700),
        scaling_row("30 s window, half as many again a minute", careful, step, 2700),
        scaling_row("as deployed, a day in 2 h", hpa, day, 7200),
    ]
    return table(f"{header} | engine-hours |", rows)


def report() -> str:
    """All tables."""
    rates = (1, 10, 100, 1_000, 10_000, 100_000)
    return (
        "### Replicas by load: gateways / tokenizers / engines / cells\n\n"
        f"{plan_table(rates, CHAT)}\n\n"
        "### Autoscaling (8B): a step 5 → 17 → 5 requests/s, a day 3 … 17\n\n"
        f"{scaling_table()}"
    )


def main() -> None:
    """Print the plan of one load, or all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rate", type=float, help="requests a second; prints the plan for them")
    parser.add_argument("--prompt-tokens", type=int, default=CHAT.prompt_tokens)
    parser.add_argument("--completion-tokens", type=int, default=CHAT.completion_tokens)
    options = parser.parse_args()
    work = Workload(options.prompt_tokens, options.completion_tokens)
    if options.rate is None:
        print(report())
    elif options.rate <= 0 or work.prompt_tokens < 1 or work.completion_tokens < 1:
        parser.error("the rate and both numbers of tokens must be positive")
    else:
        print("gateways / tokenizers / engines / cells")
        print(plan_table([options.rate], work))


if __name__ == "__main__":
    main()
