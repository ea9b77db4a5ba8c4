"""Which slot of the device's tables a shaped row has, and that the slot holds what the row needs.

Slots are a cache by request, the least recently used given up first. The kernels count each id
they choose, so a request that goes on step after step brings nothing; a slot is written anew where
it is new, where a processor adds something else than in the step before, and where it does not hold
exactly the tokens that the row says have come (a step was lost).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow, RowResult
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.sampling.processors import bias_version, device_bias, is_shaped
from nanoinfer_engine.sampling.processors.base import Entries
from nanoinfer_engine.sampling.processors.penalties import count_entries


@dataclass
class _Slot:
    """What the tables hold at `index`; None is nothing of use."""

    index: int
    num_counted: int | None = None
    bias_version: Hashable = None


class ShapingSlots:
    """The slots of the tables `counts` and `bias` [slots, vocabulary] (see `kernels.shaping`)."""

    def __init__(self, counts: Tensor, bias: Tensor) -> None:
        """All slots are free; there must be one for every row of a step."""
        self._counts, self._bias = counts, bias
        self._vocab_size = counts.shape[1]
        self._free = list(range(len(counts)))
        self._held: OrderedDict[int, _Slot] = OrderedDict()

    def place(
        self, rows: Sequence[BatchRow], places: Mapping[int, int], sampled: Tensor
    ) -> tuple[dict[int, int], dict[int, RowResult]]:
        """The slots of the rows that are shaped in this step, by index, ready for the kernels.

        The second are rows that cannot be shaped, with their SamplingError. `places` says where in
        `sampled` the ids are that the previous step chose.
        """
        wanted = [index for index, row in enumerate(rows) if row.samples and is_shaped(row)]
        for index in wanted:  # first: what this step needs is not given up for its newcomers
            if rows[index].request_number in self._held:
                self._held.move_to_end(rows[index].request_number)
        slots: dict[int, int] = {}
        failed: dict[int, RowResult] = {}
        for index in wanted:
            row = rows[index]
            slot = self._slot(row.request_number)
            try:
                self._write_bias(slot, row)
                self._write_counts(slot, row, places, sampled)
            except SamplingError as error:
                failed[index] = error
            else:
                slots[index] = slot.index
        return slots, failed

    def _slot(self, request_number: int) -> _Slot:
        slot = self._held.get(request_number)
        if slot is None:
            index = self._free.pop() if self._free else self._held.popitem(last=False)[1].index
            slot = self._held[request_number] = _Slot(index)
        return slot

    def _write_bias(self, slot: _Slot, row: BatchRow) -> None:
        version = bias_version(row)
        if slot.bias_version == version:
            return
        slot.bias_version = None
        bias = device_bias(row)
        self._write(self._bias[slot.index], bias.base, bias.entries())
        slot.bias_version = version

    def _write_counts(
        self, slot: _Slot, row: BatchRow, places: Mapping[int, int], sampled: Tensor
    ) -> None:
        """Make the slot count the tokens before this row's, and expect the row's own."""
        counts = row.token_counts
        known = 0 if counts is None else counts.num_counted
        needed = known + (row.source_row is not None)
        is_right = slot.num_counted == needed or (counts is None and slot.num_counted is not None)
        slot.num_counted = None
        if not is_right:
            own = self._counts[slot.index]
            self._write(own, 0, count_entries(counts))
            if row.source_row is not None:
                place = places[row.source_row]
                token = sampled[place : place + 1].long().clamp(min=0)  # -1 ends the request
                own[token] += 2
        # before the step is launched: if it is lost, this is too many, and the slot written anew
        slot.num_counted = needed + 1

    def _write(self, table: Tensor, base: float, entries: Entries) -> None:
        """A slot's row of a table: `base` but for the entries; nothing waits for the device."""
        ids, values = entries
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise SamplingError("a token id is outside the vocabulary")
        table.fill_(base)
        if not len(ids):
            return
        packed = torch.from_numpy(np.stack([ids.astype(np.int32), values.view(np.int32)]))
        if table.is_cuda:
            packed = packed.pin_memory()
        positions, bits = packed.to(table.device, non_blocking=True)
        table.scatter_(0, positions.long(), bits.view(table.dtype))
