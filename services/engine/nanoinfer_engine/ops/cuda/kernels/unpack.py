"""The first kernel of a decode step: what the host brought, spread to where the others read it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.launch import power_of_two

HEADER = 4
"""Numbers before the fields of an entry: rows, width of the tables, two unused."""


@triton.jit
def _unpack_kernel(
    ring,
    turn,
    current,
    fields,
    tables,
    max_rows,
    entry_size,
    table_stride,
    HEADER: tl.constexpr,
    FIELDS: tl.constexpr,
    FIELDS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.load(turn)
    entry = ring + place.to(tl.int64) * entry_size
    count = tl.load(entry)
    width = tl.load(entry + 1)
    lanes = tl.arange(0, FIELDS_PAD)
    inside = lanes < FIELDS
    values = tl.load(entry + HEADER + lanes * max_rows + row, mask=inside)
    tl.store(fields + lanes * max_rows + row, values, mask=inside)
    if row == 0:
        tl.store(current, place)
    if row < count:
        source = entry + HEADER + FIELDS * max_rows + row * width
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            blocks = tl.load(source + columns, mask=columns < width)
            target = tables + row.to(tl.int64) * table_stride + columns
            tl.store(target, blocks, mask=columns < width)


def unpack(
    ring: Tensor, turn: Tensor, current: Tensor, fields: Tensor, tables: Tensor, num_rows: int
) -> None:
    """Entry `turn` of `ring` [entries, size] into `fields` [fields, rows] and `tables` [rows, any].

    All int32. An entry is its header, the fields, and a table of its width for each of its rows;
    `num_rows` rows of the fields are taken, padding included. `current` is set to `turn`.
    """
    num_fields, max_rows = fields.shape
    _unpack_kernel[(num_rows,)](
        ring,
        turn,
        current,
        fields,
        tables,
        max_rows,
        ring.shape[1],
        tables.stride(0),
        HEADER=HEADER,
        FIELDS=num_fields,
        FIELDS_PAD=power_of_two(num_fields),
        BLOCK=256,
        num_warps=1,
    )
