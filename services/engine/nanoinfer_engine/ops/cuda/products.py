"""Kernel shapes for matrix products and decode attention, from a table per card.

`benchmarks/tune.py` measures and writes the tables in `tables/`. A size that no table has takes the
shape of the nearest size that fits; nothing is measured when an engine starts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoinfer_common.json_files import read_object

from nanoinfer_engine.ops.cuda.kernels.decode import AttentionShape
from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, TileShape

_LOG = logging.getLogger(__name__)

FEW_ROWS = (8, 16, 32, 64)
"""Batch sizes up to which a kernel of our own may multiply; beyond the last cuBLAS does."""

GEMV_SHAPES = (
    GemvShape(1, 512, 1),
    GemvShape(1, 1024, 1),
    GemvShape(1, 1024, 2),
    GemvShape(2, 1024, 2),
    GemvShape(2, 512, 2),
    GemvShape(4, 512, 4),
    GemvShape(1, 2048, 4),
    GemvShape(1, 4096, 4),
)
"""Candidates for one row."""

_TABLES = Path(__file__).parent / "tables"
_DEFAULT_CARD = "NVIDIA H200"
_FALLBACK_GEMV = (GemvShape(1, 1024, 1), GemvShape(1, 512, 1))
_FALLBACK_ATTENTION = AttentionShape(
    tile=64, num_warps=4, num_stages=3, prefetch=False, num_programs=1024
)


@dataclass(frozen=True)
class ProductKind:
    """Facts that decide how fast a kernel shape multiplies: sizes and what surrounds the product.

    `gated` ends in activation · mul, `joins` goes into the residual sum and may come in parts,
    `scaled` has a weight of 8 bits.
    """

    outputs: int
    inputs: int
    gated: bool
    joins: bool
    scaled: bool

    def fits(self, shape: GemvShape | TileShape | None) -> bool:
        """Whether a kernel of that shape can compute this product."""
        if isinstance(shape, GemvShape):
            return shape.block_k < 2 * self.inputs
        if shape is None:
            return True
        parts_fit = shape.splits == 1 or self.joins
        return parts_fit and self.inputs % (shape.block_k * shape.splits) == 0

    def distance(self, other: ProductKind) -> float:
        """How unlike two sizes are, in doublings; kinds of other surroundings are far."""
        sizes = math.log2(self.outputs / other.outputs), math.log2(self.inputs / other.inputs)
        others = (self.gated != other.gated) + (self.joins != other.joins)
        return abs(sizes[0]) + abs(sizes[1]) + 4 * others + 100 * (self.scaled != other.scaled)


class TuningTable:
    """Shapes by kind and number of rows, as measured on one card."""

    def __init__(
        self,
        products: dict[ProductKind, dict[int, GemvShape | TileShape | None]],
        attention: dict[tuple[int, int], dict[int, AttentionShape]],
    ) -> None:
        """`attention` is by (KV heads, head dim); numbers of rows are upper bounds."""
        self.products, self.attention = products, attention

    def gemv(self, kind: ProductKind) -> GemvShape | None:
        """The shape for one row; None where the product is too narrow for any."""
        for choices in self._near(kind):
            shape = choices.get(1)
            if isinstance(shape, GemvShape) and kind.fits(shape):
                return shape
        return next((shape for shape in _FALLBACK_GEMV if kind.fits(shape)), None)

    def tile(self, kind: ProductKind, rows: int) -> TileShape | None:
        """The shape for 2 to 64 rows; None where cuBLAS multiplies."""
        size = next((size for size in FEW_ROWS if size >= rows), None)
        if size is None:
            return None
        for choices in self._near(kind):
            if size in choices and kind.fits(choices[size]):
                shape = choices[size]
                return shape if isinstance(shape, TileShape) else None
        return None

    def attention_shape(self, kv_heads: int, dim: int, rows: int) -> AttentionShape:
        """The shape of decode attention over `rows` rows."""

        def distance(key: tuple[int, int]) -> float:
            return abs(math.log2(key[0] / kv_heads)) + 4 * abs(math.log2(key[1] / dim))

        if not self.attention:
            return _FALLBACK_ATTENTION
        shapes = self.attention[min(self.attention, key=distance)]
        larger = [size for size in shapes if size >= rows]
        return shapes[min(larger) if larger else max(shapes)]

    def _near(self, kind: ProductKind) -> Iterable[Mapping[int, GemvShape | TileShape | None]]:
        return (self.products[each] for each in sorted(self.products, key=kind.distance))


def read_table(card: str) -> TuningTable:
    """The table of `card`, by its CUDA name; another card's, with a line in the log, where none."""
    file = _TABLES / f"{_file_name(card)}.json"
    if not file.is_file():
        _LOG.warning(
            "no tuning table for %s: shapes of %s are used; benchmarks/tune.py writes one",
            card,
            _DEFAULT_CARD,
        )
        file = _TABLES / f"{_file_name(_DEFAULT_CARD)}.json"
    return table_from_json(read_object(file))


def table_from_json(content: Mapping[str, Any]) -> TuningTable:
    """The table that `table_to_json` wrote."""
    products = {
        ProductKind(*entry["sizes"], *entry["flags"]): {
            int(rows): _shape(values) for rows, values in entry["rows"].items()
        }
        for entry in content["products"]
    }
    attention = {
        (entry["kv_heads"], entry["head_dim"]): {
            int(rows): AttentionShape(*values) for rows, values in entry["rows"].items()
        }
        for entry in content["attention"]
    }
    return TuningTable(products, attention)


def table_to_json(table: TuningTable) -> dict[str, Any]:
    """Plain values: sizes [outputs, inputs], flags [gated, joins, scaled], a shape's numbers."""
    return {
        "products": [
            {
                "sizes": [kind.outputs, kind.inputs],
                "flags": [kind.gated, kind.joins, kind.scaled],
                "rows": {rows: _values(shape) for rows, shape in choices.items()},
            }
            for kind, choices in table.products.items()
        ],
        "attention": [
            {
                "kv_heads": kv_heads,
                "head_dim": dim,
                "rows": {
                    rows: [s.tile, s.num_warps, s.num_stages, s.prefetch, s.num_programs]
                    for rows, s in shapes.items()
                },
            }
            for (kv_heads, dim), shapes in table.attention.items()
        ],
    }


def _file_name(card: str) -> str:
    return card.lower().replace(" ", "-")


def _shape(values: Sequence[int] | None) -> GemvShape | TileShape | None:
    """Three numbers are a GEMV's, five a tile's."""
    if values is None:
        return None
    return GemvShape(*values) if len(values) == 3 else TileShape(*values)


def _values(shape: GemvShape | TileShape | None) -> list[int] | None:
    if shape is None:
        return None
    if isinstance(shape, GemvShape):
        return [shape.block_n, shape.block_k, shape.num_warps]
    return [shape.block_n, shape.block_k, shape.splits, shape.num_warps, shape.num_stages]
