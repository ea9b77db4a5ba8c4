"""Measures this machine's costs for the scale model, and writes them into its calibration.

    python benchmarks/calibrate.py [--model models/guide]

Starts the three services on loopback. Costs of gateway and tokenizer are CPU time of their
processes; step times of the engine are those that its streams saw, on one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import mean

import grpc
from launch import Running, stack
from load import GREEDY, Target, sender, stopping
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from nanoinfer_common.channels import DIRECT
from nanoinfer_common.json_files import read_object
from serving import PROMPT, encode, machine

CALIBRATION = Path(__file__).parent / "scale" / "calibration.json"
CONCURRENCY = 8


async def spent(
    service: Running, call: Callable[[], Awaitable[int]], times: int
) -> tuple[float, float]:
    """CPU µs of a service for one call, and the mean result, after some calls to warm up."""

    async def repeat(times: int) -> list[int]:
        left, results = iter(range(times)), list[int]()

        async def worker() -> None:
            for _ in left:
                results.append(await call())

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
        return results

    await repeat(50)
    before = service.processor_seconds()
    results = await repeat(times)
    return (service.processor_seconds() - before) / times * 1e6, mean(results)


async def gateway_costs(gateway: Running) -> tuple[float, float]:
    """CPU µs of a request with one token, and of each further message."""
    async with grpc.aio.insecure_channel(gateway.address, DIRECT) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)

        async def generate(max_tokens: int) -> int:
            options = gateway_pb2.GenerationOptions(sampling=GREEDY, stopping=stopping(max_tokens))
            request = gateway_pb2.GatewayServiceGenerateStreamRequest(text=PROMPT, options=options)
            return len([m async for m in stub.GenerateStream(request, timeout=300)])

        short, few = await spent(gateway, lambda: generate(1), 400)
        long, many = await spent(gateway, lambda: generate(64), 100)
    return short, (long - short) / (many - few)


async def tokenizer_costs(tokenizer: Running) -> tuple[float, float]:
    """CPU µs of an Encode without its text, and of each byte of text."""
    async with grpc.aio.insecure_channel(tokenizer.address, DIRECT) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)

        async def call(copies: int) -> int:
            request = tokenizer_pb2.TokenizerServiceEncodeRequest(text=PROMPT * copies)
            return len((await stub.Encode(request, timeout=30)).tokens.ids)

        short, _ = await spent(tokenizer, lambda: call(1), 800)
        long, _ = await spent(tokenizer, lambda: call(48), 400)
    size = len(PROMPT.encode())
    each = (long - short) / (47 * size)
    return short - each * size, each


async def engine_steps(engine: Running, prompt: list[int]) -> tuple[dict[str, float], float]:
    """Milliseconds of a decode step by batch size, and prompt tokens a second: the best of six."""
    steps: dict[str, float] = {}
    services = {"engine": [engine]}
    async with grpc.aio.insecure_channel(engine.address, DIRECT) as channel:
        for streams in (1, 8, 32):
            one, times = sender(Target("engine", [prompt], 64, services), [channel]), []
            for _ in range(6):
                samples = await asyncio.gather(*(one(0) for _ in range(streams)))
                # the last to start sees no prefill of others
                times.append(min(sample.time_per_token for sample in samples))
            steps[str(streams)] = round(min(times) * 1e3, 3)
        firsts = []
        for number in range(6):
            # another first token each time, so that no prefix is ever shared
            long = Target("engine", [[number + 1, *prompt * 20][:1024]], 1, services)
            firsts.append((await sender(long, [channel])(0)).arrivals[0])
    return steps, round(1024 / min(firsts), 1)


def main() -> None:
    """Measure, and rewrite the measured entries of the calibration."""
    parser = argparse.ArgumentParser(description="measures the costs for benchmarks/scale")
    parser.add_argument("--model", type=Path, default=Path("models/guide"))
    options = parser.parse_args()
    calibration, started = read_object(CALIBRATION), time.monotonic()
    with stack(options.model, ["--threads", "1"]) as running:
        start_seconds = round(time.monotonic() - started, 1)
        (prompt,) = asyncio.run(encode(running.tokenizer.address, [PROMPT]))
        gateway = asyncio.run(gateway_costs(running.gateways[0]))
        tokenizer = asyncio.run(tokenizer_costs(running.tokenizer))
        steps, prefill = asyncio.run(engine_steps(running.engine, prompt))
    source = f"measured by benchmarks/calibrate.py: {machine()}"
    names = ("gateway_request", "gateway_message", "tokenizer_request", "tokenizer_byte")
    for name, value in zip(names, (*gateway, *tokenizer), strict=True):
        calibration["costs"][name] |= {"value": round(value, 4), "source": source}
    calibration["engines"]["guide-cpu"] |= {
        "step_ms": steps,
        "prefill_tokens_per_second": prefill,
        "start_seconds": start_seconds,
        "source": f"{source}; one thread, contexts of about 100, start of all three services",
    }
    CALIBRATION.write_text(json.dumps(calibration, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
