"""Clients of a running stack: streams that are kept up, from one process or from several.

A client in Python spends some 50 µs on a message, so one process of them may be what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import statistics
import threading
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from google.protobuf.message import Message
from launch import Running
from nanoinfer.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    generation_pb2,
)
from nanoinfer_common.channels import DIRECT

GREEDY = generation_pb2.SamplingParams(temperature=0)
_SECONDS = 600


@dataclass(frozen=True)
class Target:
    """Where requests go and what they say: texts to gateways, in turns, or ids to an engine."""

    path: Literal["gateway", "engine"]
    prompts: Sequence[str] | Sequence[Sequence[int]]
    max_tokens: int
    services: Mapping[str, Sequence[Running]]
    """All whose processor time is of interest, by name; requests go to those named as `path`."""

    def processor_seconds(self) -> dict[str, float]:
        """Of each service's processes until now, and of this one as a client."""
        seconds = {
            name: sum(each.processor_seconds() for each in processes)
            for name, processes in self.services.items()
        }
        return {**seconds, "clients": time.process_time()}


@dataclass(frozen=True)
class Sample:
    """One stream as its client saw it: seconds from the call to each message with tokens."""

    arrivals: Sequence[float]
    num_tokens: int

    @property
    def time_per_token(self) -> float:
        """Seconds per token but the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True)
class Share:
    """Samples and cost of one process of clients, on a clock that all have in common."""

    samples: list[Sample]
    began: float
    ended: float
    processor_seconds: dict[str, float]


def measure(
    target: Target, num_streams: int, num_requests: int, num_clients: int = 1
) -> dict[str, object]:
    """`num_streams` streams of `num_requests` requests each, after one each to warm up.

    They are shared by `num_clients` processes, and all begin at once.
    """
    context = multiprocessing.get_context("spawn")
    count = min(num_clients, num_streams)
    with context.Manager() as manager, ProcessPoolExecutor(count, mp_context=context) as pool:
        start = manager.Barrier(count)
        running = [
            pool.submit(run_share, target, range(n, num_streams, count), num_requests, start)
            for n in range(count)
        ]
        shares = [each.result() for each in running]
    wall = max(each.ended for each in shares) - min(each.began for each in shares)
    samples = list(itertools.chain.from_iterable(each.samples for each in shares))
    spent = {
        # all shares begin at once, and the last to end has seen all of a service's time
        name: (sum if name == "clients" else max)(each.processor_seconds[name] for each in shares)
        for name in shares[0].processor_seconds
    }
    gaps = sorted(b - a for each in samples for a, b in itertools.pairwise(each.arrivals))
    return {
        "path": target.path,
        "streams": num_streams,
        "requests": len(samples),
        "tok_s": round(sum(each.num_tokens for each in samples) / wall, 1),
        "ttft_p50_ms": _milliseconds(statistics.median(each.arrivals[0] for each in samples)),
        "tpot_p50_ms": _milliseconds(statistics.median(each.time_per_token for each in samples)),
        "itl_p99_ms": _milliseconds(gaps[len(gaps) * 99 // 100]) if gaps else None,
        "cores": {name: round(seconds / wall, 2) for name, seconds in spent.items()},
    }


def run_share(target: Target, numbers: range, num_requests: int, start: threading.Barrier) -> Share:
    """The streams of these `numbers`, in a process of its own; `start` is where all wait."""
    try:
        return asyncio.run(_run_share(target, numbers, num_requests, start))
    except BaseException:
        start.abort()  # nobody shall wait for this one
        raise


async def _run_share(
    target: Target, numbers: range, num_requests: int, start: threading.Barrier
) -> Share:
    async with contextlib.AsyncExitStack() as channels:
        opened = [
            await channels.enter_async_context(grpc.aio.insecure_channel(address, DIRECT))
            for address in (each.address for each in target.services[target.path])
        ]
        request = sender(target, opened)

        async def stream(number: int) -> list[Sample]:
            return [await request(number + numbers.stop * each) for each in range(num_requests)]

        await asyncio.gather(*map(request, numbers))
        await asyncio.to_thread(start.wait, _SECONDS)
        before, began = target.processor_seconds(), time.monotonic()
        samples = await asyncio.gather(*map(stream, numbers))
        ended, after = time.monotonic(), target.processor_seconds()
        spent = {name: after[name] - before[name] for name in after}
        return Share(list(itertools.chain.from_iterable(samples)), began, ended, spent)


def stopping(max_tokens: int) -> generation_pb2.StoppingParams:
    """So many tokens, whatever they are."""
    return generation_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True)


def sender(
    target: Target, channels: Sequence[grpc.aio.Channel]
) -> Callable[[int], Awaitable[Sample]]:
    """A function that sends the request of a number and reads its stream."""
    calls: list[Any] = [
        gateway_pb2_grpc.GatewayServiceStub(channel).GenerateStream
        if target.path == "gateway"
        else engine_pb2_grpc.EngineServiceStub(channel).Generate
        for channel in channels
    ]
    limits = stopping(target.max_tokens)
    options = gateway_pb2.GenerationOptions(sampling=GREEDY, stopping=limits)

    def message(prompt: str | Sequence[int]) -> Message:
        if isinstance(prompt, str):
            return gateway_pb2.GatewayServiceGenerateStreamRequest(text=prompt, options=options)
        return engine_pb2.EngineServiceGenerateRequest(
            prompt=generation_pb2.TokenIds(ids=prompt), sampling=GREEDY, stopping=limits
        )

    def send(number: int) -> Awaitable[Sample]:
        request = message(target.prompts[number % len(target.prompts)])
        call = calls[number % len(calls)]
        return _read(call(request, timeout=_SECONDS), target.max_tokens)

    return send


async def _read(stream: AsyncIterable[object], num_tokens: int) -> Sample:
    """Reads a stream to its end; a delta with text or ids is a token, or several."""
    started = time.perf_counter()
    arrivals = [
        time.perf_counter() - started
        async for message in stream
        if message.deltas  # type: ignore[attr-defined]
    ]
    if not arrivals:
        raise RuntimeError("a stream ended without a token")
    return Sample(arrivals, num_tokens)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)
