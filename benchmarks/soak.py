"""Soaks an engine in memory pressure and checks every stream against the same request alone.

    python benchmarks/soak.py --model models/guide --minutes 10 [--seed 0] [--streams 24]

Runs two engines behind gRPC in this process, one after the other. The first has memory for all,
no prefix cache and one row: it says what each request gives alone. The second has memory for a few
requests, so that preemption is constant, and is sent random arrivals with shared prefixes, tenants,
priorities, n > 1, stop ids, cancels and deadlines until the time is up.

A stream passes if its tokens are those of the request alone, or a beginning of them where it was
cut short. A divergence is excused, and counted, where the two best logits of the request alone are
closer than 1e-4 at the first token that differs. Then nothing may be left: no block in use, none
lost, no request, no task and no file descriptor that was not there before, and no more resident
memory than after the first quarter but for a margin.
Prints one JSON object; the exit code is 1 where something failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import structlog
from nanoinfer.v1 import engine_pb2, engine_pb2_grpc, generation_pb2
from nanoinfer_common.channels import DIRECT
from nanoinfer_common.server import ServiceStatus, running
from nanoinfer_engine.server.service import EngineService
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_engine.step.runner import ModelRunner

TIE = 1e-4
MEMORY_MARGIN = 32 * 2**20
TENANTS = ("red", "green", "blue")
REFUSED = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}


@dataclass(frozen=True)
class Case:
    """A request with what it gives alone; `gaps` separate the two best logits at each token."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass
class Tally:
    """Counts of what happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    cached_tokens: int = 0
    excused: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)


@dataclass
class Server:
    """A running engine and the way to it."""

    service: EngineService
    stub: engine_pb2_grpc.EngineServiceAsyncStub


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Server]:
    """An engine on a free port of loopback."""
    services: list[EngineService] = []

    def make(status: ServiceStatus) -> EngineService:
        services.append(EngineService(chosen, status, ModelRunner))
        return services[0]

    chosen = EngineSettings(**({"port": 0, "metrics_port": None, "threads": 1} | settings))
    async with (
        running(make, chosen) as server,
        grpc.aio.insecure_channel(server.address, DIRECT) as channel,
    ):
        yield Server(services[0], engine_pb2_grpc.EngineServiceStub(channel))


def ask(
    case_prompt: Sequence[int],
    max_tokens: int,
    n: int,
    logprobs: int | None,
    stop_token_ids: Sequence[int] = (),
) -> engine_pb2.EngineServiceGenerateRequest:
    """A greedy request."""
    stopping = generation_pb2.StoppingParams(
        max_tokens=max_tokens, ignore_eos=True, stop_token_ids=stop_token_ids
    )
    return engine_pb2.EngineServiceGenerateRequest(
        prompt=generation_pb2.TokenIds(ids=case_prompt),
        sampling=generation_pb2.SamplingParams(temperature=0, n=n),
        stopping=stopping,
        response=generation_pb2.ResponseOptions(logprobs=logprobs),
    )


def make_prompts(chance: random.Random, count: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Prompts of 8 to 360 ids; most begin like others, at lengths that end inside a block too."""
    trunks = [[chance.randrange(300, vocab_size) for _ in range(300)] for _ in range(4)]
    prompts = []
    for _ in range(count):
        common = chance.choice(trunks)[: chance.choice((0, 16, 33, 128, 200, 300))]
        own = [chance.randrange(300, vocab_size) for _ in range(chance.randrange(8, 60))]
        prompts.append((*common, *own))
    return prompts


async def alone(server: Server, prompt: tuple[int, ...], max_tokens: int) -> Case:
    """Results of a request that has the machine to itself."""
    tokens: list[int] = []
    gaps: list[float] = []
    async for message in server.stub.Generate(ask(prompt, max_tokens, 1, 2)):
        for delta in message.deltas:
            tokens += delta.token_ids
            gaps += [entry.top[0].logprob - entry.top[1].logprob for entry in delta.logprobs]
    return Case(prompt, tuple(tokens), tuple(gaps))


def expected_tokens(case: Case, max_tokens: int, stop_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Ids that the request alone gives with these stops."""
    tokens = case.tokens[:max_tokens]
    ends = [i for i, token_id in enumerate(tokens) if token_id in stop_token_ids]
    return tokens[: ends[0]] if ends else tokens


def judge(
    case: Case, expected: Sequence[int], tokens: Sequence[int], is_whole: bool, tally: Tally
) -> None:
    """Compare a stream with the request alone."""
    tally.tokens += len(tokens)
    pairs = enumerate(zip(tokens, expected, strict=False))
    first = next((i for i, (given, wanted) in pairs if given != wanted), None)
    if first is None:
        if len(tokens) > len(expected) or (is_whole and len(tokens) < len(expected)):
            tally.wrong.append(f"{len(tokens)} tokens for {len(expected)}, whole: {is_whole}")
        return
    if case.gaps[first] < TIE:
        tally.excused.append(case.gaps[first])
    else:
        tally.wrong.append(f"token {first} of {len(case.prompt)}-token prompt: {case.gaps[first]}")


async def visit(server: Server, case: Case, chance: random.Random, tally: Tally) -> None:
    """One client: reads to the end, cancels on the way, or runs into its deadline."""
    n = chance.choice((1, 1, 1, 1, 2, 4))
    max_tokens = chance.randrange(1, len(case.tokens) + 1)
    stops = (chance.choice(case.tokens),) if chance.random() < 0.3 else ()
    cancel_after = chance.randrange(0, max_tokens) if chance.random() < 0.2 else None
    timeout = chance.uniform(0.05, 2.0) if chance.random() < 0.1 else 300
    metadata = (
        ("x-nanoinfer-tenant", chance.choice(TENANTS)),
        ("x-nanoinfer-priority", str(chance.choice((-1, 0, 0, 0, 1)))),
    )
    call = server.stub.Generate(
        ask(case.prompt, max_tokens, n, None, stops), metadata=metadata, timeout=timeout
    )
    streams: list[list[int]] = [[] for _ in range(n)]
    outcome = "complete"
    try:
        async for message in call:
            for delta in message.deltas:
                streams[delta.index] += delta.token_ids
            tally.cached_tokens += message.summary.usage.cached_tokens
            if cancel_after is not None and len(streams[0]) > cancel_after:
                call.cancel()
    except grpc.aio.AioRpcError as error:
        outcome = error.code().name
        if error.code() not in REFUSED:
            tally.wrong.append(f"{outcome}: {error.details()}")
    except asyncio.CancelledError:
        outcome = "CANCELLED"
    tally.outcomes[outcome] += 1
    for tokens in streams:
        expected = expected_tokens(case, max_tokens, stops)
        judge(case, expected, tokens, outcome == "complete", tally)


async def client(
    server: Server, cases: Sequence[Case], seed: int, ends: float, tally: Tally
) -> None:
    """Visits until the time is up, with pauses."""
    chance = random.Random(seed)
    while time.monotonic() < ends:
        await visit(server, chance.choice(cases), chance, tally)
        if chance.random() < 0.3:
            await asyncio.sleep(chance.expovariate(10))


def observe(tally: Tally) -> None:
    """Note what the process holds now."""
    process = psutil.Process()
    tally.memory.append(process.memory_info().rss)
    tally.descriptors.append(process.num_fds())
    tally.tasks.append(len(asyncio.all_tasks()))


async def watch_process(ends: float, tally: Tally) -> None:
    """Samples of what the process holds, one a second."""
    while time.monotonic() < ends:
        observe(tally)
        await asyncio.sleep(1)


async def check_nothing_left(server: Server, tally: Tally) -> None:
    """Every request has ended and every block is back, once each."""
    for _ in range(200):
        reply = await server.stub.GetLoad(engine_pb2.EngineServiceGetLoadRequest())
        if not reply.load.running_requests + reply.load.waiting_requests:
            break
        await asyncio.sleep(0.05)
    observe(tally)
    for name, values in (("descriptors", tally.descriptors), ("tasks", tally.tasks)):
        if values[-1] > values[0]:
            tally.wrong.append(f"{values[0]} {name} before and {values[-1]} afterwards")
    load = reply.load
    if load.running_requests or load.waiting_requests or load.kv_cache_usage:
        tally.wrong.append(f"left behind: {load}")
    pool = server.service._engine._scheduler._tables._pool
    if sorted([*pool._free, *pool._kept]) != list(range(pool.num_blocks)):
        tally.wrong.append("blocks are lost or listed twice")
    snapshot = server.service._engine.statistics
    if snapshot.counters["accepted"] != sum(snapshot.finished.values()):
        tally.wrong.append("accepted requests and ended ones differ")


def report(server: Server, tally: Tally, num_seconds: float) -> dict[str, object]:
    """The figures."""
    snapshot = server.service._engine.statistics
    quarter = tally.memory[len(tally.memory) // 4 : -1]
    growth = max(quarter[len(quarter) // 2 :]) - max(quarter[: len(quarter) // 2 + 1])
    if growth > MEMORY_MARGIN:
        tally.wrong.append(f"memory grew by {growth} bytes")
    return {
        "seconds": round(num_seconds, 1),
        "streams": dict(tally.outcomes),
        "completions": {reason.value: n for reason, n in snapshot.finished.items()},
        "tokens_compared": tally.tokens,
        "cached_prompt_tokens": snapshot.counters["cached_tokens"],
        "prompt_tokens": snapshot.counters["prompt_tokens"],
        "preemptions": snapshot.counters["preemptions"],
        "excused_ties": len(tally.excused),
        "largest_excused_gap": max(tally.excused, default=0.0),
        "resident_mib": [round(value / 2**20) for value in (quarter[0], quarter[-1])],
        "resident_growth_mib": round(growth / 2**20, 1),
        "descriptors": [tally.descriptors[0], max(tally.descriptors), tally.descriptors[-1]],
        "tasks": [tally.tasks[0], max(tally.tasks), tally.tasks[-1]],
        "failures": len(tally.wrong),
        "first_failures": tally.wrong[:10],
    }


async def soak(arguments: argparse.Namespace) -> dict[str, object]:
    """Both engines, one after the other."""
    chance = random.Random(arguments.seed)
    model = {"model": arguments.model, "max_batch_tokens": 128}
    async with serving(
        **model, kv_cache_memory="64MiB", max_batch_requests=1, prefix_caching=False
    ) as server:
        info = await server.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())
        prompts = make_prompts(chance, arguments.cases, info.model.vocab_size - 8)
        cases = [await alone(server, prompt, arguments.max_tokens) for prompt in prompts]
    tally = Tally()
    async with serving(
        **model, kv_cache_memory=arguments.kv_cache_memory, max_batch_requests=16
    ) as server:
        await server.stub.GetModelInfo(engine_pb2.EngineServiceGetModelInfoRequest())  # connects
        observe(tally)
        began = time.monotonic()
        ends = began + 60 * arguments.minutes
        await asyncio.gather(
            watch_process(ends, tally),
            *(
                client(server, cases, chance.randrange(2**32), ends, tally)
                for _ in range(arguments.streams)
            ),
        )
        await check_nothing_left(server, tally)
        return report(server, tally, time.monotonic() - began)


def main() -> int:
    """Soak and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/guide"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=24, help="clients at a time")
    parser.add_argument("--cases", type=int, default=48, help="different requests")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--kv-cache-memory", default="3MiB")
    level = logging.ERROR
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    logging.basicConfig(level=level)
    figures = asyncio.run(soak(parser.parse_args()))
    print(json.dumps(figures, indent=2))
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
