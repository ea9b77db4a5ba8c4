"""Decode steps as CUDA graphs: one per padded batch size, captured before serving.

A graph replays launches with the addresses they were captured with; whoever captures keeps the
inputs in place. All graphs share one memory pool, because only one runs at a time. What other
threads do meanwhile (NCCL's watches its operations) does not disturb the capture.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch


def padded_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: dense where a row more costs most, then every 16th."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
    sizes += range(80, max_rows + 16, 16)
    return sorted({min(size, max_rows) for size in sizes})


class DecodeGraphs:
    """Captured decode steps by padded batch size."""

    def __init__(self, memory_budget: int, least: Callable[[int], int] = int) -> None:
        """`memory_budget` in bytes: once capturing has taken it, the sizes left stay eager.

        `least` is that of several ranks, which must capture the same sizes.
        """
        self._memory_budget = memory_budget
        self._least = least
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._sizes: list[int] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """The captured sizes, ascending."""
        return tuple(self._sizes)

    def capture(self, run: Callable[[int], None], sizes: Sequence[int]) -> None:
        """Capture `run(size)` for each size; it must only launch, on memory that stays."""
        pool = torch.cuda.graph_pool_handle()
        free_before = torch.cuda.mem_get_info()[0]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # the largest first: the smaller ones then fit into its pool
        for size in sorted(sizes, reverse=True):
            taken = free_before - torch.cuda.mem_get_info()[0]
            if not self._least(taken <= self._memory_budget):
                break
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(size)  # compiles, and lets the libraries allocate, outside the capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                run(size)
            self._graphs[size] = graph
        self._sizes = sorted(self._graphs)

    def can_replay(self, num_rows: int) -> bool:
        """Whether a graph holds at least `num_rows` rows."""
        return bool(self._sizes) and num_rows <= self._sizes[-1]

    def padded(self, num_rows: int) -> int:
        """The size of the graph that `replay(num_rows)` takes."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, num_rows: int) -> None:
        """Launch the smallest graph that holds `num_rows` rows."""
        self._graphs[self.padded(num_rows)].replay()
