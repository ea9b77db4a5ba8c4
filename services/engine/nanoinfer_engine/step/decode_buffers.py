"""What decode steps read and write in static memory, and the ring that fills it beside the steps.

The host writes a step into the ring's next entry while the step before runs, and a stream of its
own copies it; the step's first kernel spreads it, its last one leaves the ids in another ring, from
which that stream takes them. So nothing but the step itself stands between two steps.

    host ─▶ ring[n] ──unpack──▶ fields, tables ──▶ layers ──choose──▶ history[n] ─▶ host
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.ops.cuda.attention import PagedPlan
from nanoinfer_engine.ops.cuda.kernels.sampling import DeviceSampling, History
from nanoinfer_engine.ops.cuda.kernels.unpack import HEADER, unpack
from nanoinfer_engine.step.device_inputs import (
    SAMPLING_FIELDS,
    Ints,
    block_tables,
    device_sampling,
    sampling_arrays,
    sources,
)

_ENTRIES = 4  # two steps are in flight at most
_FIELDS = 3 + SAMPLING_FIELDS  # token, source, context before them
_MINUS_ONE = [1, 4]  # source and slot of a row that has none, as padding


class DecodeBuffers:
    """Static device memory that the decode graphs read: `max_rows` rows of `max_blocks` blocks."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        """All rows are padding at first."""
        self._max_rows = max_rows
        size = HEADER + (_FIELDS + max_blocks) * max_rows
        self._on_host = torch.zeros((_ENTRIES, size), dtype=torch.int32, pin_memory=True)
        self._entries = [entry.numpy() for entry in self._on_host]
        for entry in self._entries:
            _row_fields(entry, max_rows)[_MINUS_ONE] = -1
        self._ring = self._on_host.to(device)
        self._fields = torch.zeros((_FIELDS, max_rows), dtype=torch.int32, device=device)
        self.token_ids, self.sources, self.contexts = self._fields[:3]
        device_sampling(self._fields[3:]).slot.fill_(-1)
        self.tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        turns = torch.zeros(2, dtype=torch.int32, device=device)
        ids = torch.zeros((_ENTRIES, max_rows), dtype=torch.int32, device=device)
        self.history = History(ids, turn=turns[:1], current=turns[1:])
        # one each way: what goes up must not wait for what comes down, which waits for a step
        self._up, self._down = _stream(device), _stream(device)
        self._ends: list[torch.cuda.Event | None] = [None] * _ENTRIES
        self._next = 0
        self._is_taken = True  # whether a step has run since the last entry was brought

    def plan(self, num_rows: int) -> PagedPlan:
        """The attention plan of the first `num_rows` rows."""
        return PagedPlan(num_rows, self.tables[:num_rows], self.contexts[:num_rows], None)

    def sampling(self, num_rows: int) -> DeviceSampling:
        """How the first `num_rows` rows choose."""
        return device_sampling(self._fields[3:, :num_rows])

    def fill(
        self,
        rows: Sequence[BatchRow],
        places: Mapping[int, int],
        slots: Mapping[int, int],
        padded: int,
    ) -> None:
        """Bring `rows` into the ring, padded to `padded` rows; the current stream waits for it.

        `places` as in `sources`, `slots` as in `sampling_arrays`.
        """
        count, width = len(rows), max(len(row.block_ids) for row in rows)
        index, self._next = self._next, (self._next + 1) % _ENTRIES
        if (end := self._ends[index]) is not None:
            end.synchronize()
        if not self._is_taken:  # a launch failed in between
            self.history.turn.fill_(index)
        self._is_taken = False
        start = HEADER + _FIELDS * self._max_rows
        stop = start + count * width
        entry = self._entries[index]
        entry[:2] = count, width
        fields = _row_fields(entry, self._max_rows)
        fields[0, :count] = [row.token_ids[-1] if row.token_ids else 0 for row in rows]
        fields[1, :count] = sources(rows, places)
        fields[2, :count] = [row.context_length for row in rows]
        fields[3:, :count] = sampling_arrays(rows, slots)
        fields[:, count:padded] = 0
        fields[_MINUS_ONE, count:padded] = -1
        entry[start:stop] = block_tables(rows, width).reshape(-1)
        with torch.cuda.stream(self._up):
            self._ring[index, :stop].copy_(self._on_host[index, :stop], non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._up)

    def unpack(self, num_rows: int) -> None:
        """Launch the step's first kernel; what `choose` does with `history` is its last."""
        unpack(
            self._ring,
            self.history.turn,
            self.history.current,
            self._fields,
            self.tables,
            num_rows,
        )

    def bring(self, count: int, end: torch.cuda.Event) -> tuple[Tensor, torch.cuda.Event]:
        """The first `count` ids of the step that `end` ends, and when they are on the host."""
        self._is_taken = True
        index = (self._next - 1) % _ENTRIES
        self._ends[index] = end
        self._down.wait_event(end)
        ids = torch.empty(count, dtype=torch.int32, pin_memory=True)
        with torch.cuda.stream(self._down):
            ids.copy_(self.history.ids[index, :count], non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return ids, copied

    def rewind(self) -> None:
        """Begin with the next entry, after steps that nobody brought rows for."""
        self.history.turn.fill_(self._next)


def _row_fields(entry: Ints, max_rows: int) -> Ints:
    """The view [fields, rows] of an entry."""
    return entry[HEADER : HEADER + _FIELDS * max_rows].reshape(_FIELDS, max_rows)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
