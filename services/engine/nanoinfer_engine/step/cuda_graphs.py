"""Steps as CUDA graphs, captured before serving; decode steps by padded batch size.

A graph replays launches with the addresses they were captured with; whoever captures keeps the
inputs in place. All graphs share one memory pool, because only one runs at a time. What other
threads do meanwhile (NCCL's watches its operations) does not disturb the capture.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor


def padded_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: dense where a row more costs most, then every 16th."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
    sizes += range(80, max_rows + 16, 16)
    return sorted({min(size, max_rows) for size in sizes})


class CapturedSteps:
    """Launches that can be replayed, by any key; all graphs share one memory pool."""

    def __init__(self, memory_budget: int, least: Callable[[int], int] = int) -> None:
        """`memory_budget` in bytes: once capturing has taken it, nothing more is captured.

        `least` is that of several ranks, which must capture the same steps.
        """
        self._memory_budget = memory_budget
        self._least = least
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[Hashable, Tensor] = {}
        self._free_before: int | None = None

    def __contains__(self, key: Hashable) -> bool:
        """Whether it was captured."""
        return key in self._graphs

    def capture(self, key: Hashable, run: Callable[[], Tensor]) -> bool:
        """Capture `run`, which must only launch, on memory that stays; False where none is left."""
        if self._free_before is None:
            self._free_before = torch.cuda.mem_get_info()[0]
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        taken = self._free_before - torch.cuda.mem_get_info()[0]
        if not self._least(taken <= self._memory_budget):
            return False
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles, and lets the libraries allocate, outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            output = run()
        self._graphs[key] = graph
        self._outputs[key] = _borrowed(output)
        return True

    def replay(self, key: Hashable) -> Tensor:
        """Launch what was captured.

        Returns what it computes, to be read before the next replay is launched.
        """
        self._graphs[key].replay()
        return self._outputs[key]


class DecodeGraphs:
    """Captured decode steps by padded batch size."""

    def __init__(self, captured: CapturedSteps) -> None:
        """None is captured yet."""
        self._captured = captured
        self._sizes: list[int] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """The captured sizes, ascending."""
        return tuple(self._sizes)

    def capture(self, run: Callable[[int], Tensor], sizes: Sequence[int]) -> None:
        """Capture `run(size)` for each size, as far as memory lasts."""
        # the largest first: the smaller ones then fit into its pool
        for size in sorted(sizes, reverse=True):
            if not self._captured.capture(size, partial(run, size)):
                break
            self._sizes.insert(0, size)

    def can_replay(self, num_rows: int) -> bool:
        """Whether a graph holds at least `num_rows` rows."""
        return bool(self._sizes) and num_rows <= self._sizes[-1]

    def padded(self, num_rows: int) -> int:
        """The size of the graph that `replay(num_rows)` takes."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, num_rows: int) -> Tensor:
        """Launch the smallest graph that holds `num_rows` rows; as in `CapturedSteps`."""
        return self._captured.replay(self.padded(num_rows))


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
