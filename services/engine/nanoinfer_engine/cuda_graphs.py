"""Decode steps as CUDA graphs: one per padded batch size, captured before serving.

A graph replays launches with the addresses they were captured with; whoever captures keeps the
inputs in place. All graphs share one memory pool, because only one runs at a time. What other
threads do meanwhile (NCCL's watches its operations) does not disturb the capture.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
        self._outputs: dict[int, Tensor] = {}
        self._sizes: list[int] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """The captured sizes, ascending."""
        return tuple(self._sizes)

    def capture(self, run: Callable[[int], Tensor], sizes: Sequence[int]) -> None:
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
                output = run(size)
            self._graphs[size] = graph
            self._outputs[size] = _borrowed(output)
            del output
        self._sizes = sorted(self._graphs)

    def can_replay(self, num_rows: int) -> bool:
        """Whether a graph holds at least `num_rows` rows."""
        return bool(self._sizes) and num_rows <= self._sizes[-1]

    def padded(self, num_rows: int) -> int:
        """The size of the graph that `replay(num_rows)` takes."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, num_rows: int) -> Tensor:
        """Launch the smallest graph that holds `num_rows` rows.

        Returns what it computes, to be read before the next replay is launched.
        """
        size = self.padded(num_rows)
        self._graphs[size].replay()
        return self._outputs[size]


class _Place:
    """The memory of a tensor, described for who reads it without owning it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """A view of contiguous half-precision memory that the pool may give to the next graph.

    Graphs run one after another: a graph's output stays in its place until another one runs. To
    own the outputs of all sizes would take as much memory again as many of them.
    """
    return torch.as_tensor(_Place(tensor), device=tensor.device).view(tensor.dtype)
