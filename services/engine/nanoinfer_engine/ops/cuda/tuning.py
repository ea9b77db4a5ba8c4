"""How long launches take on the device, for those who choose among kernels before serving."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch


def time_graph(run: Callable[[], object], repeats: int = 3) -> float:
    """Median microseconds of `run`, captured in a CUDA graph."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        began = mark()
        graph.replay()
        ended = mark()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1000)
    return float(statistics.median(times))


def device_lag(run: Callable[[], object], repeats: int = 3) -> float:
    """How many times as long the device takes to end `run` as the host to launch it.

    1 where the device waits for launches; the median, so that compiling does not count.
    """
    lags: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        launched = time.perf_counter() - began
        torch.cuda.synchronize()
        lags.append((time.perf_counter() - began) / launched)
    return float(statistics.median(lags))


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all: what is freed is kept for the stream that it was taken on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def mark() -> torch.cuda.Event:
    """An event that the current stream comes to next; others tell the time since it."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
