"""How many replicas serve a load, how autoscalers behave: prints the tables of docs/scaling.md.

    python -m benchmarks.scale [--full] [--write docs/scaling.md]

Fast (the default) takes seconds; `--full` replaces the day of two hours by one of 24.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.scale.autoscaler import Rules, Settings
from benchmarks.scale.queues import Profile, Workload, cost
from benchmarks.scale.simulation import (
    BYTES_PER_TOKEN,
    CPU_REQUEST,
    MAX_MESSAGES,
    WATCH_SECONDS,
    Installation,
    Simulation,
    outcome,
)

OBJECTIVE = 1.0  # seconds to the first token
CHAT = Workload(512, 256)
LONG = Workload(1024, 2048)
CELL_ENGINES = 64
SMALL = {"gateway": 12, "tokenizer": 2, "engine": 2}
LARGE = {"gateway": 50, "tokenizer": 2, "engine": 8}
SERVICES = ("gateway", "tokenizer", "engine")
MARKS = ("<!-- begin: python -m benchmarks.scale -->", "<!-- end -->")


def plan(profile: Profile, work: Workload, rate: float) -> dict[str, int]:
    """Replicas of each service, and cells, for a rate: each at its autoscaler's target."""
    settings = {service: Settings.load(service) for service in SERVICES}
    engines = rate / profile.capacity(work, int(settings["engine"].targets["running"]))
    reports = min(math.ceil(engines), CELL_ENGINES) / WATCH_SECONDS * cost("load_report")
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


def plan_rows() -> Iterable[list[object]]:
    """Replicas by rate, for each engine."""
    profiles = [Profile(name) for name in ("guide-cpu", "0.6b-h200", "8b-h200")]
    for rate in (1, 10, 100, 1_000, 10_000, 100_000):
        cells = [plan(profile, CHAT, rate) for profile in profiles]
        yield [f"{rate:,}", *(" / ".join(f"{n:,}" for n in cell.values()) for cell in cells)]


def check_rows() -> Iterable[list[object]]:
    """The plan's figures against the event model with the planned replicas."""
    profile = Profile("8b-h200")
    for rate, seconds in ((10, 400), (100, 90), (400, 40)):
        planned = plan(profile, CHAT, rate)
        engines = planned["engine"]
        simulation = Simulation(Installation(profile, CHAT, planned))
        simulation.run(partial(_steady, rate), rate, seconds)
        begin = seconds / 2
        done = [r for r in simulation.requests if r.first_token and r.arrived < seconds - 15]
        late = [r for r in done if r.arrived > begin]
        # Little's law: the streams of an engine are its arrivals times how long they last
        stays = [r.finished - r.arrived for r in late if r.finished is not None]
        streams = rate / engines * float(np.mean(stays))
        expected = next(n for n in range(1, 65) if profile.capacity(CHAT, n) * engines >= rate)
        seen = outcome(simulation, OBJECTIVE, begin)
        yield [rate, engines, expected, f"{streams:.1f}", *_milliseconds(seen.p50, seen.p99)]


def peer_rows() -> Iterable[list[object]]:
    """The engine model against `vllm bench serve` on the GPU that its step times are from."""
    measured = {1: (178, 24.6, 5.04), 64: (4_887, 613, 8.39), 256: (6_152, 1_761, 27.1)}
    profile = Profile("8b-h200", max_batch_requests=256, max_batch_tokens=8192)
    services = {"gateway": 64, "tokenizer": 8, "engine": 1}
    for concurrency, (rate, first, gap) in measured.items():
        simulation = Simulation(Installation(profile, Workload(512, 128, 0), services))
        simulation.run_closed(concurrency, 8 * concurrency)
        done = [(r, r.first_token or 0.0, r.finished or 0.0) for r in simulation.requests]
        firsts = float(np.median([first - r.arrived for r, first, _ in done]))
        gaps = float(np.median([(finished - first) / 127 for _, first, finished in done]))
        tokens = 128 * len(done) / simulation.clock.now
        pairs = ((tokens, rate, ",.0f"), (firsts * 1e3, first, ",.0f"), (gaps * 1e3, gap, ".1f"))
        yield [concurrency, *(f"{a:{form}} / {b:{form}}" for a, b, form in pairs)]


def pick_rows() -> Iterable[list[object]]:
    """How engines are picked, in cells of growing size at the planned load."""
    profile = Profile("8b-h200")
    for engines in (4, 16, 64):
        rate = engines * profile.capacity(CHAT, 48)
        row: list[object] = [engines, f"{rate:,.0f}"]
        for pick in ("live", "reports", "two"):
            services = {"gateway": 6 * engines, "tokenizer": 2 + engines, "engine": engines}
            simulation = Simulation(Installation(profile, CHAT, services, pick=pick))
            simulation.run(partial(_steady, rate), rate, 10)
            seen = outcome(simulation, OBJECTIVE / 10, 5)
            row.append(" / ".join(map(str, _milliseconds(seen.p50, seen.p99))))
        yield row


def _steady(rate: float, _: float) -> float:
    return rate


def _step(time: float) -> float:
    return 17.0 if 300 <= time < 1500 else 5.0


def _day(length: float, time: float) -> float:
    return 10.0 - 7.0 * math.cos(2 * math.pi * time / length)


def _milliseconds(*seconds: float) -> list[object]:
    return [f"{1e3 * value:,.0f}" for value in seconds]


def scaling_row(
    name: str,
    installed: Installation,
    rate: Callable[[float], float],
    span: tuple[float, float],
    step_at: float | None = None,
) -> list[object]:
    """One scenario of the autoscalers: what users saw, what it cost, how often it turned round."""
    seconds, max_rate = span
    simulation = Simulation(installed)
    simulation.run(rate, max_rate, seconds)
    seen = outcome(simulation, OBJECTIVE, step_at=step_at)
    sizes = np.diff(simulation.engines.sizes)
    turns = int((np.diff(np.sign(sizes[sizes != 0])) != 0).sum())
    peak = f"{max(simulation.engines.sizes)} / {max(simulation.gateways.sizes)}"
    hours = [tier.replica_seconds / 3600 for tier in (simulation.engines, simulation.gateways)]
    recovered = "–" if step_at is None else f"{seen.recovered:,.0f} s"
    shares = f"{seen.over:.1%} ({seen.refused:.1%})"
    return [name, shares, f"{seen.p99:.1f} s", recovered, turns, peak, *(f"{h:.1f}" for h in hours)]


def changed(**engine: object) -> dict[str, Settings]:
    """The deployed settings with others for the engine."""
    settings = {service: Settings.load(service) for service in SERVICES}
    return settings | {"engine": replace(settings["engine"], **engine)}  # type: ignore[arg-type]


def step_rows() -> Iterable[list[object]]:
    """A load that jumps from 5 to 17 requests a second for 20 minutes, and back."""
    hpa = Installation(Profile("8b-h200"), LONG, SMALL, "hpa")
    cautious = Rules(30, (("Percent", 50, 60), ("Pods", 2, 60)))
    earlier = Settings.load("engine").targets | {"running": 32.0}
    variants = {
        "fixed at 8": replace(hpa, scaler="none", replicas=LARGE),
        "HPA as deployed": hpa,
        "KEDA as deployed": replace(hpa, scaler="keda"),
        "HPA, engines start in 5 min": replace(hpa, engine_start=300.0),
        "HPA, 30 s window, half as many again a minute": replace(
            hpa, settings=changed(up=cautious)
        ),
        "HPA, running target 32": replace(hpa, settings=changed(targets=earlier)),
    }
    for name, installed in variants.items():
        yield scaling_row(name, installed, _step, (2700, 17), 300)


def day_row(hours: float) -> list[object]:
    """A day between 3 and 17 requests a second, squeezed into `hours`."""
    installed = Installation(Profile("8b-h200"), LONG, SMALL, "hpa")
    seconds = hours * 3600
    return scaling_row(f"day of {hours:g} h, HPA", installed, partial(_day, seconds), (seconds, 17))


def report(day_hours: float) -> str:
    """All tables."""
    scaling = (
        "| | over 1 s (of them refused) | TTFT p99 | recovered after | turns"
        " | engines / gateways, most | engine-hours | gateway-hours |"
    )
    parts = {
        "Replicas by load: gateways / tokenizers / engines / cells": table(
            "| requests/s | guide, CPU | 0.6B, H200 | 8B, H200 |", plan_rows()
        ),
        "The plan against the event model (8B)": table(
            "| requests/s | engines | streams each: planned | simulated | TTFT p50 ms | p99 ms |",
            check_rows(),
        ),
        "The engine model against vLLM on the same GPU: model / measured": table(
            "| concurrency | tok/s | TTFT p50 ms | TPOT p50 ms |", peer_rows()
        ),
        "Picking an engine: TTFT p50 / p99 in ms": table(
            "| engines | requests/s | by the load now | by reports | by reports, best of two |",
            pick_rows(),
        ),
        "Autoscaling (8B): a step 5 → 17 → 5 requests/s, a day 3 … 17": table(
            scaling, [*step_rows(), day_row(day_hours)]
        ),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def main() -> None:
    """Prints the report, or puts it into a document between its marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="a day of 24 hours")
    parser.add_argument("--write", type=Path, help="Markdown file whose marked part is replaced")
    options = parser.parse_args()
    text = report(24 if options.full else 2)
    if options.write is None:
        print(text)
        return
    before, _, rest = options.write.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    options.write.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
