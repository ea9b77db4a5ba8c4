"""The fastest of cuBLASLt's algorithms for a product, found by measuring around its proposals.

The library proposes eight, most of them with clusters of multiprocessors that share what they read.
On an H200 the same tiles without a cluster, tiles that it proposes for half or twice as many rows,
and options whose meaning it keeps to itself were up to a tenth faster than the best of the eight.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.cublaslt import Algorithm, multiply, proposals, variants
from nanoinfer_engine.ops.cuda.tuning import mark

_LOG = logging.getLogger(__name__)

MANY_ROWS = 512
"""From here on arithmetic takes longer than reading the weights."""

_NUM_LISTED = 3
# clusters as the library counts them: 1 × 1, 2 × 1, 1 × 2
_ALONE, _CLUSTERS = (2,), (2, 3, 5)
_CUSTOMS = range(8)
_MORE_TILES = (15, 17, 167)  # won on an H200 where the library proposed them for no near size
_MORE_CUSTOMS = (0, 4)
_MOST_WEIGHTS = 12
# products of so many operations take a card to its limit of power, where what saves energy is
# faster than what saves cycles: each is repeated for 30 ms of an H200
_LONG, _STRETCH = 1.5e12, 2e13
# how far a right product may be from torch's, relative; two roundings of the format at most
_RIGHT = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_CHECKED_ROWS = 256
# launching takes 10 to 20 µs: the device sleeps until all that is timed stands in its queue
_CYCLES_PER_LAUNCH = 50_000


def shortlist(weights: Sequence[Tensor], rows: int, *, joins: bool) -> list[Algorithm]:
    """The fastest for x [rows, in] @ weight [out, in] transposed, best first; maybe none.

    Few rows are multiplied by the weights of several layers in turn, so that these are read from
    memory. With `joins` the product is added to what the output holds.
    """
    weight, began = weights[0], time.perf_counter()
    own = proposals(rows, weight)
    if not own:
        return []
    near = [*own, *proposals(max(rows // 2, 1), weight), *proposals(2 * rows, weight)]
    race = _Race(weights[: 1 if rows >= MANY_ROWS else _MOST_WEIGHTS], rows, joins)
    others = variants(own[0], _MORE_TILES, _ALONE, _MORE_CUSTOMS, rows, weight)
    for each in _of_different_tiles(near):
        others += variants(each, (each.tile,), _ALONE, (each.custom,), rows, weight)
    ranked = race.rank([*own, *others], 2)
    around = variants(ranked[0], (ranked[0].tile,), _CLUSTERS, _CUSTOMS, rows, weight)
    ranked = race.rank([*ranked[:_NUM_LISTED], *around], 2)
    operations = 2 * rows * weight.numel()
    is_long = operations >= _LONG
    those = dict.fromkeys([*ranked[: 2 * _NUM_LISTED], *(own if is_long else [])])
    last = [each for each in those if race.is_right(each)]
    ranked = (
        race.rank(last, 2, max(int(_STRETCH / operations), 1)) if is_long else race.rank(last, 5)
    )
    listed = ranked[:_NUM_LISTED]
    seconds = time.perf_counter() - began
    _LOG.debug("%s × %d: %s, %.0f ms", tuple(weight.shape), rows, listed, 1000 * seconds)
    return listed


class _Race:
    """One product, timed with algorithms that take turns: the clock's drift under load hits all."""

    def __init__(self, weights: Sequence[Tensor], rows: int, joins: bool) -> None:
        outputs, columns = weights[0].shape
        dtype, device = weights[0].dtype, weights[0].device
        self._x = torch.randn(rows, columns, dtype=dtype, device=device)
        self._output = torch.zeros(rows, outputs, dtype=dtype, device=device)
        self._weights, self._joins = list(weights), joins
        self._loaded: set[Algorithm] = set()

    def rank(
        self, algorithms: Iterable[Algorithm], rounds: int, repeats: int = 1
    ) -> list[Algorithm]:
        """The fastest first, by the median of `rounds` turns of `repeats` products."""
        those = list(dict.fromkeys(algorithms))
        self._turn([each for each in those if each not in self._loaded])
        self._loaded.update(those)
        turns = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            cycles = len(those) * len(self._weights) * _CYCLES_PER_LAUNCH
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            turns.append(self._turn(those, repeats))
        torch.cuda.synchronize()
        times = {
            each: statistics.median(turn[i].elapsed_time(turn[i + 1]) for turn in turns)
            for i, each in enumerate(those)
        }
        return sorted(those, key=lambda each: times[each])

    def is_right(self, algorithm: Algorithm) -> bool:
        """Whether its product is torch's, whatever its options mean, and also for fewer rows."""
        weight, rows = self._weights[0], len(self._x)
        for count in {rows, max(rows - 3, 1), rows // 2 + 1}:
            x, output = self._x[:count], self._output[:count]
            multiply(x, weight, output.fill_(1), algorithm, add=self._joins)
            for first in {0, max(count - _CHECKED_ROWS, 0)}:
                part = slice(first, first + _CHECKED_ROWS)
                expected = (x[part] @ weight.t()).float() + self._joins
                error = (output[part] - expected).norm() / expected.norm()
                if not error < _RIGHT[x.dtype]:
                    _LOG.warning("%s is wrong by %.2g at %d rows", algorithm, error, count)
                    return False
        return True

    def _turn(self, algorithms: Iterable[Algorithm], repeats: int = 1) -> list[torch.cuda.Event]:
        """Launch all, each between two events."""
        marks = [mark()]
        for algorithm in algorithms:
            for weight in self._weights * repeats:
                multiply(self._x, weight, self._output, algorithm, add=self._joins)
            marks.append(mark())
        return marks


def _of_different_tiles(algorithms: Iterable[Algorithm]) -> list[Algorithm]:
    """The first of each tile."""
    first: dict[int, Algorithm] = {}
    for each in algorithms:
        first.setdefault(each.tile, each)
    return list(first.values())
