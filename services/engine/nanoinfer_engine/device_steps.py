"""Steps on a CUDA device that return before they have run; ids reach the host one step late.

A row may continue from an id that the previous step sampled and the host has not seen: the id is
taken from device memory. Rows that need more than temperature, top-k, top-p, min-p and a seed do
not come here (`BatchRow.is_plain`).
"""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from nanoinfer_engine.batch import Batch, RowResult
from nanoinfer_engine.collectives import ALONE, Rank
from nanoinfer_engine.cuda_graphs import DecodeGraphs, padded_sizes
from nanoinfer_engine.device_inputs import DecodeBuffers, mixed_inputs, reads_new_blocks
from nanoinfer_engine.errors import SamplingError
from nanoinfer_engine.kernels.sampling import SamplingWorkspace, choose
from nanoinfer_engine.models.fused import FusedDecoder, StepTokens
from nanoinfer_engine.request import SampledToken

_GRAPH_MEMORY = 4 << 30
# beyond these rows the launches are long enough to hide one another; with several ranks none starts
# early, because NCCL's kernels stand between ours
_PDL_ROWS = 64


class DeviceStep:
    """A launched step; `results` waits for it."""

    def __init__(self, ids: Tensor | None, places: dict[int, int], num_rows: int) -> None:
        """`ids` are being copied to the host; `places` says where a row's id is among them."""
        self._ids = ids
        self._num_rows = num_rows
        self.places = places
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()
        self._results: list[RowResult] | None = None

    @property
    def is_done(self) -> bool:
        """Whether `results` returns at once."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def results(self) -> list[RowResult]:
        """One result per row of the batch; blocks until the device is done."""
        if self._results is None:
            self._event.synchronize()
            ids: list[int] = [] if self._ids is None else self._ids.tolist()
            self._results = [None] * self._num_rows
            for row, place in self.places.items():
                self._results[row] = _result(ids[place])
        return self._results


def _result(token_id: int) -> RowResult:
    if token_id < 0:
        return SamplingError("logits are not finite")
    return SampledToken(token_id)


class DeviceSteps:
    """Launches steps of plain rows over one model and cache."""

    def __init__(
        self,
        decoder: FusedDecoder,
        vocab_size: int,
        block_size: int,
        max_rows: int,
        max_blocks: int,
        device: torch.device,
        rank: Rank = ALONE,
    ) -> None:
        """`max_rows` rows in a step at most, each of `max_blocks` blocks."""
        self._pdl_rows = _PDL_ROWS if rank.size == 1 else 0
        self._decoder, self._block_size, self._device = decoder, block_size, device
        self._buffers = DecodeBuffers(max_rows, max_blocks, device)
        self._workspace = SamplingWorkspace(max_rows, vocab_size, device)
        self._sampled = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._max_rows = max_rows
        self.graphs = DecodeGraphs(_GRAPH_MEMORY, rank.least)
        self.timings: dict[str, float] = {}

    def prepare(self) -> None:
        """Choose kernels, capture the decode graphs; what exists then is never collected."""
        self.timings = self._decoder.tune(self._max_rows, self._pdl_rows)
        self.graphs.capture(self.run_decode, padded_sizes(self._max_rows))
        # a full collection over all that torch has made stops the steps for tens of milliseconds
        gc.collect()
        gc.freeze()

    def launch(self, batch: Batch, places: dict[int, int]) -> DeviceStep:
        """Run `batch`; `places` are the previous step's, for rows that continue from it."""
        decodes = all(row.num_tokens == 1 and row.samples for row in batch.rows)
        if decodes and not reads_new_blocks(batch.rows, self._block_size):
            return self._launch_decode(batch, places)
        inputs = mixed_inputs(batch.rows, places, self._block_size, self._device)
        tokens = StepTokens(inputs.token_ids, inputs.sources, self._sampled)
        hidden = self._decoder.forward(tokens, inputs.plan)
        count = len(inputs.sampled_rows)
        if not count:
            return DeviceStep(None, {}, len(batch.rows))
        logits = self._decoder.logits(hidden.select(inputs.sampled_tokens))
        choose(logits, inputs.sampling, self._workspace, self._sampled)
        new_places = {row: place for place, row in enumerate(inputs.sampled_rows)}
        return DeviceStep(self._to_host(count), new_places, len(batch.rows))

    def _launch_decode(self, batch: Batch, places: dict[int, int]) -> DeviceStep:
        count = len(batch.rows)
        replays = self.graphs.can_replay(count)
        padded = self.graphs.padded(count) if replays else count
        self._buffers.fill(batch.rows, places, padded)
        if replays:
            self.graphs.replay(count)
        else:
            self.run_decode(count)
        return DeviceStep(self._to_host(count), {row: row for row in range(count)}, count)

    def run_decode(self, num_rows: int) -> None:
        """Launch a decode step on the static buffers; what the graphs capture."""
        pdl, buffers = num_rows <= self._pdl_rows, self._buffers
        tokens = StepTokens(buffers.token_ids[:num_rows], buffers.sources[:num_rows], self._sampled)
        hidden = self._decoder.forward(tokens, buffers.plan(num_rows), pdl=pdl)
        logits = self._decoder.logits(hidden, pdl=pdl)
        choose(logits, buffers.sampling(num_rows), self._workspace, self._sampled, pdl=pdl)

    def _to_host(self, count: int) -> Tensor:
        ids = torch.empty(count, dtype=torch.int32, pin_memory=True)
        return ids.copy_(self._sampled[:count], non_blocking=True)
