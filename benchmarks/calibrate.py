"""Measures what the scale model needs to know of this machine, and writes it into its calibration.

    python benchmarks/calibrate.py [--model models/guide]

Starts the three services on loopback. Costs of gateway and tokenizer are CPU time of their
processes (user and system) over the requests or messages handled; step times of the engine are what
its streams saw, ids in and ids out, on one thread. What is not measured here stays as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
from launch import Running, stack
from load import GREEDY, Target, sender, stopping
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from nanoinfer_common.channels import DIRECT
from nanoinfer_common.json_files import read_object
from serving import PROMPT, encode, machine

CALIBRATION = Path(__file__).parent / "scale" / "calibration.json"
CONCURRENCY = 8
DECODE_TOKENS = 64


async def repeat(call: Callable[[], Awaitable[int]], times: int) -> int:
    """Awaits `call` so often, eight at a time; returns the sum of what it gave."""
    left = iter(range(times))

    async def worker() -> int:
        return sum([await call() for _ in left])

    return sum(await asyncio.gather(*(worker() for _ in range(CONCURRENCY))))


async def gateway_costs(gateway: Running) -> tuple[float, float]:
    """CPU µs of a request with one token, and of each further message."""
    async with grpc.aio.insecure_channel(gateway.address, DIRECT) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)

        async def messages(max_tokens: int) -> int:
            options = gateway_pb2.GenerationOptions(sampling=GREEDY, stopping=stopping(max_tokens))
            request = gateway_pb2.GatewayServiceGenerateStreamRequest(text=PROMPT, options=options)
            return len([m async for m in stub.GenerateStream(request, timeout=300)])

        await repeat(lambda: messages(4), 50)
        spent = []
        for max_tokens, times in ((1, 400), (DECODE_TOKENS, 100)):
            before = gateway.processor_seconds()
            count = await repeat(lambda tokens=max_tokens: messages(tokens), times)  # type: ignore[misc]
            spent.append((gateway.processor_seconds() - before, times, count))
    (short, short_times, short_count), (long, long_times, long_count) = spent
    request = short / short_times
    extra = long_count - long_times * short_count / short_times
    return request * 1e6, (long - long_times * request) / extra * 1e6


async def tokenizer_costs(tokenizer: Running) -> tuple[float, float]:
    """CPU µs of an Encode without its text, and of each byte of text."""
    async with grpc.aio.insecure_channel(tokenizer.address, DIRECT) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)

        async def one(text: str) -> int:
            request = tokenizer_pb2.TokenizerServiceEncodeRequest(text=text)
            return len((await stub.Encode(request, timeout=30)).tokens.ids)

        sizes, costs = [], []
        for copies, times in ((1, 800), (48, 400)):
            text = PROMPT * copies
            await repeat(lambda text=text: one(text), 50)  # type: ignore[misc]
            before = tokenizer.processor_seconds()
            await repeat(lambda text=text: one(text), times)  # type: ignore[misc]
            costs.append((tokenizer.processor_seconds() - before) / times * 1e6)
            sizes.append(len(text.encode()))
    each = (costs[1] - costs[0]) / (sizes[1] - sizes[0])
    return costs[0] - each * sizes[0], each


async def engine_steps(engine: Running, prompt: list[int]) -> tuple[dict[str, float], float]:
    """Milliseconds of a decode step by batch size, and prompt tokens computed in a second.

    The best round counts: these are wall times, and whatever else runs here only adds to them.
    """
    steps: dict[str, float] = {}
    services = {"engine": [engine]}
    async with grpc.aio.insecure_channel(engine.address, DIRECT) as channel:
        for streams in (1, 8, 32):
            target, times = Target("engine", [prompt], DECODE_TOKENS, services), []
            one = sender(target, [channel])
            for _ in range(6):
                samples = await asyncio.gather(*(one(0) for _ in range(streams)))
                # the last to start sees no prefill of others any more
                times.append(min(sample.time_per_token for sample in samples))
            steps[str(streams)] = round(min(times) * 1e3, 3)
        firsts = []
        for number in range(6):
            # another first token each time, so that no prefix is ever shared
            long = Target("engine", [[number + 1, *prompt * 20][:1024]], 1, services)
            firsts.append((await sender(long, [channel])(0)).arrivals[0])
    return steps, round(1024 / min(firsts), 1)


def main() -> None:
    """Measures and rewrites the measured entries of the calibration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/guide"))
    options = parser.parse_args()
    calibration = read_object(CALIBRATION)
    started = time.monotonic()
    with stack(options.model, ["--threads", "1"]) as running:
        seconds_for_three = time.monotonic() - started
        (prompt,) = asyncio.run(encode(running.tokenizer.address, [PROMPT]))
        request, message = asyncio.run(gateway_costs(running.gateways[0]))
        call, byte = asyncio.run(tokenizer_costs(running.tokenizer))
        steps, prefill = asyncio.run(engine_steps(running.engine, prompt))
    source = f"measured by benchmarks/calibrate.py: {machine()}"
    for name, value in {
        "gateway_request": round(request, 1),
        "gateway_message": round(message, 1),
        "tokenizer_request": round(call, 1),
        "tokenizer_byte": round(byte, 4),
    }.items():
        calibration["costs"][name] |= {"value": value, "source": source}
    calibration["engines"]["guide-cpu"] |= {
        "step_ms": steps,
        "prefill_tokens_per_second": prefill,
        "start_seconds": round(seconds_for_three, 1),
        "source": f"{source}; one thread, contexts of about 100, start of all three services",
    }
    CALIBRATION.write_text(json.dumps(calibration, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps({**calibration["costs"], **calibration["engines"]["guide-cpu"]}, indent=1))


if __name__ == "__main__":
    main()
