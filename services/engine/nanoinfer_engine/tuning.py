"""How long launches take on the device, for those who choose among kernels before serving."""

from __future__ import annotations

import statistics
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


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all: what is freed is kept for the stream that it was taken on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def mark() -> torch.cuda.Event:
    """An event that the current stream comes to next; others tell the time since it."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
