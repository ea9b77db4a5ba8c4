"""Measures a running stack: tokens/s at several stream counts, TTFT, and what the gateway costs.

    python benchmarks/serving.py --model models/guide [--streams 1 8 32] [--repeats 3]

Starts the three services on loopback (or takes `--gateway` and `--engine` addresses), sends the
same work once through the gateway as text and once to the engine as ids, and prints JSON lines and
a table. Every request is greedy, ignores EOS and produces `--max-tokens` tokens.

- tok/s: completion tokens of all streams over the wall time from the first call to the last message
- TTFT: from the call to the first message that holds a token, as the client sees it
- gateway overhead: the same figures through the gateway against those at the engine, in one run
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from launch import stack
from nanoinfer.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    generation_pb2,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)

PROMPT = "The engine keeps the keys and values of every token in blocks of the KV cache. " * 4


@dataclass(frozen=True)
class Sample:
    """One stream as its client saw it, in seconds."""

    time_to_first_token: float
    duration: float
    num_tokens: int


def stopping(max_tokens: int) -> generation_pb2.StoppingParams:
    return generation_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True)


GREEDY = generation_pb2.SamplingParams(temperature=0)


async def consume(stream: AsyncIterator[object], num_tokens: int) -> Sample:
    """Reads a stream to its end; a delta with text or ids is the first token."""
    started = time.perf_counter()
    first = None
    async for message in stream:
        if first is None and message.deltas:  # type: ignore[attr-defined]
            first = time.perf_counter() - started
    if first is None:
        raise SystemExit("a stream ended without a token")
    return Sample(first, time.perf_counter() - started, num_tokens)


class GatewayLoad:
    """Text in, text out."""

    name = "gateway"

    def __init__(self, channel: grpc.aio.Channel, max_tokens: int) -> None:
        self._stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        self._max_tokens = max_tokens

    async def one(self) -> Sample:
        options = gateway_pb2.GenerationOptions(
            sampling=GREEDY, stopping=stopping(self._max_tokens)
        )
        request = gateway_pb2.GatewayServiceGenerateStreamRequest(text=PROMPT, options=options)
        return await consume(self._stub.GenerateStream(request, timeout=600), self._max_tokens)


class EngineLoad:
    """Ids in, ids out: the same prompt, encoded beforehand."""

    name = "engine"

    def __init__(self, channel: grpc.aio.Channel, prompt: Sequence[int], max_tokens: int) -> None:
        self._stub = engine_pb2_grpc.EngineServiceStub(channel)
        self._request = engine_pb2.EngineServiceGenerateRequest(
            prompt=generation_pb2.TokenIds(ids=prompt),
            sampling=GREEDY,
            stopping=stopping(max_tokens),
        )
        self._max_tokens = max_tokens

    async def one(self) -> Sample:
        return await consume(self._stub.Generate(self._request, timeout=600), self._max_tokens)


async def measure(load: GatewayLoad | EngineLoad, streams: int, repeats: int) -> dict[str, object]:
    """Medians over `repeats` rounds of `streams` concurrent requests, after one to warm up."""
    rates, firsts = [], []
    for round_number in range(repeats + 1):
        started = time.perf_counter()
        samples = await asyncio.gather(*(load.one() for _ in range(streams)))
        wall = time.perf_counter() - started
        if round_number:
            rates.append(sum(sample.num_tokens for sample in samples) / wall)
            firsts.extend(sample.time_to_first_token for sample in samples)
    return {
        "path": load.name,
        "streams": streams,
        "tok_s": round(statistics.median(rates), 1),
        "tok_s_min": round(min(rates), 1),
        "tok_s_max": round(max(rates), 1),
        "ttft_p50_ms": round(statistics.median(firsts) * 1000, 2),
    }


def machine() -> dict[str, str]:
    """The processor and the versions that the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("nanoinfer", "torch", "grpcio", "tiktoken", "uvloop")
    return {
        "cpu": f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


async def encode(address: str) -> list[int]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        request = tokenizer_pb2.TokenizerServiceEncodeRequest(text=PROMPT)
        return list((await stub.Encode(request, timeout=10)).tokens.ids)


async def run(addresses: dict[str, str], options: argparse.Namespace) -> list[dict[str, object]]:
    """Every stream count through both paths, alternating, so that both see the same machine."""
    prompt = await encode(addresses["tokenizer"])
    rows = []
    async with (
        grpc.aio.insecure_channel(addresses["gateway"]) as gateway_channel,
        grpc.aio.insecure_channel(addresses["engine"]) as engine_channel,
    ):
        paths: list[GatewayLoad | EngineLoad] = [
            GatewayLoad(gateway_channel, options.max_tokens),
            EngineLoad(engine_channel, prompt, options.max_tokens),
        ]
        for streams in options.streams:
            for load in paths:
                row = await measure(load, streams, options.repeats)
                rows.append({**row, "prompt_tokens": len(prompt), "max_tokens": options.max_tokens})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: Sequence[dict[str, object]]) -> str:
    """A Markdown table: one line per stream count, gateway against engine."""
    lines = [
        "| streams | tok/s | TTFT p50 ms | engine alone: tok/s | TTFT p50 ms | gateway adds |",
        "|---|---|---|---|---|---|",
    ]
    for through, alone in zip(rows[::2], rows[1::2], strict=True):
        first, inner = float(str(through["ttft_p50_ms"])), float(str(alone["ttft_p50_ms"]))
        share = 1 - float(str(through["tok_s"])) / float(str(alone["tok_s"]))
        lines.append(
            f"| {through['streams']} | {through['tok_s']} | {first} | {alone['tok_s']} | {inner} |"
            f" {first - inner:+.1f} ms TTFT, {-share:+.1%} tok/s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, starts the stack, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/guide"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=None, help="threads of the engine")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    with stack(options.model, ["--max-batch-requests", "64", *threads]) as addresses:
        rows = asyncio.run(run(addresses, options))
    print(table(rows))


if __name__ == "__main__":
    main()
