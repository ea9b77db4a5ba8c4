"""Steps on a CUDA device that return before they have run; ids reach the host one step late.

A row may continue from an id that the previous step sampled and the host has not seen: the id is
taken from device memory. Whatever a row asks for is computed there: no row waits for the host.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nanoinfer_engine.core.batch import Batch, BatchRow, RowResult, StepKind, StepTiming
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SampledToken
from nanoinfer_engine.models import Decoder
from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.ops.cuda.backend import CudaOps, CudaStep, Stream
from nanoinfer_engine.ops.cuda.kernels.sampling import SamplingWorkspace, choose
from nanoinfer_engine.sampling.device_logprobs import (
    PromptScores,
    SampledScores,
    measure_prompts,
    measure_sampled,
)
from nanoinfer_engine.sampling.device_shaping import ShapingSlots
from nanoinfer_engine.step.cuda_graphs import CapturedSteps, DecodeGraphs, padded_sizes
from nanoinfer_engine.step.decode_buffers import DecodeBuffers
from nanoinfer_engine.step.device_inputs import MixedInputs, mixed_layout, reads_new_blocks, upload
from nanoinfer_engine.step.device_timing import DeviceClock, StepEvents
from nanoinfer_engine.step.mixed_graphs import MixedGraphs

_GRAPH_MEMORY = 2 << 30  # within what `device` reserves


class DeviceStep:
    """A launched step; `results` waits for it."""

    def __init__(
        self,
        ids: Tensor | None,
        places: Mapping[int, int],
        results: list[RowResult],
        scores: Sequence[SampledScores | PromptScores],
        events: StepEvents,
        copied: torch.cuda.Event,
    ) -> None:
        """`ids` and `scores` are being copied to the host; `places` says where a row's id is.

        `results` are those of the rows that are known to fail; `copied` comes after `events`.
        """
        self._ids, self._places, self._copied = ids, places, copied
        self._results, self._scores = results, scores
        self._events = events
        self._is_read = False

    @property
    def is_done(self) -> bool:
        """Whether `results` returns at once."""
        return bool(self._copied.query())  # type: ignore[no-untyped-call]

    def results(self) -> list[RowResult]:
        """One result per row of the batch; blocks until the device is done."""
        if not self._is_read:
            self._events.wait()
            self._copied.synchronize()
            ids: list[int] = [] if self._ids is None else self._ids.tolist()
            for row, place in self._places.items():
                if not isinstance(self._results[row], Exception):
                    self._results[row] = _result(ids[place])
            for scores in self._scores:
                scores.add_to(self._results)
            self._is_read = True
        return self._results

    def timing(self) -> StepTiming:
        """After `results`: by the device's clock."""
        return self._events.timing()


def _result(token_id: int) -> RowResult:
    if token_id < 0:
        return SamplingError("logits are not finite, or every token id is masked")
    return (SampledToken(token_id),)


class DeviceSteps:
    """Launches steps over one model and cache."""

    def __init__(
        self,
        model: Decoder,
        ops: CudaOps,
        config: EngineConfig,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
        rank: Rank = ALONE,
    ) -> None:
        """A row has `max_model_len` tokens at most; `config` bounds the steps.

        With its `mixed_graphs` small steps with prompts are graphs, too, on one device: with
        several that has not been tried.
        """
        max_rows, max_tokens = config.max_batch_requests, config.max_batch_tokens
        self._rank, self._model, self._ops = rank, model, ops
        self._block_size, self._device = config.block_size, device
        max_blocks = -(-max_model_len // config.block_size)
        self._buffers = DecodeBuffers(max_rows, max_blocks, device)
        self._workspace = SamplingWorkspace(max_rows, vocab_size, device)
        self._slots = ShapingSlots(self._workspace.counts, self._workspace.bias)
        self._sampled = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._places: dict[int, int] = {}  # of the last step's rows in `_sampled`
        self._max_rows = max_rows
        captured = CapturedSteps(_GRAPH_MEMORY, rank.least)
        self.graphs = DecodeGraphs(captured)
        self.mixed_graphs = MixedGraphs(captured, max_rows, max_tokens, max_blocks, device)
        self._captures_mixed = config.mixed_graphs and rank.size == 1
        self._clock = DeviceClock()

    def prepare(self) -> None:
        """Capture the graphs; what exists then is never collected."""
        self.graphs.capture(self.run_decode, padded_sizes(self._max_rows))
        self._buffers.rewind()
        if self._captures_mixed:
            self.mixed_graphs.capture(lambda inputs: self.run_mixed(inputs)[0])
        # a full collection over all that torch has made stops the steps for tens of milliseconds
        gc.collect()
        gc.freeze()

    def launch(self, batch: Batch) -> DeviceStep:
        """Run `batch`, whose rows may continue from ids of the batch launched before it."""
        rows, places = batch.rows, self._places
        slots, failed = self._slots.place(rows, places, self._sampled)
        decodes = all(row.num_tokens == 1 and row.samples for row in rows)
        if decodes and not reads_new_blocks(rows, self._block_size):
            return self._launch_decode(rows, places, slots, failed)
        kind, logits, prompts = self._launch_mixed(rows, places, slots)
        ids, scores = None, []
        if logits is not None:
            ids = torch.empty(len(self._places), dtype=torch.int32, pin_memory=True)
            ids.copy_(self._sampled[: len(ids)], non_blocking=True)
            scores = measure_sampled(rows, self._places, logits, self._sampled)
        results = [failed.get(row, ()) for row in range(len(rows))]
        events = self._clock.end(kind)
        return DeviceStep(ids, self._places, results, [*scores, *prompts], events, events.end)

    def _launch_decode(
        self,
        rows: Sequence[BatchRow],
        places: Mapping[int, int],
        slots: Mapping[int, int],
        failed: Mapping[int, RowResult],
    ) -> DeviceStep:
        """Run rows of one token each, all of which sample."""
        count = len(rows)
        replays = self.graphs.can_replay(count)
        self._buffers.fill(rows, places, slots, self.graphs.padded(count) if replays else count)
        self._clock.begin()
        logits = self.graphs.replay(count) if replays else self.run_decode(count)
        self._places = {row: row for row in range(count)}
        scores = measure_sampled(rows, self._places, logits, self._sampled)
        events = self._clock.end("graph" if replays else "eager")
        ids, copied = self._buffers.bring(count, events.end)
        results = [failed.get(row, ()) for row in range(count)]
        return DeviceStep(ids, self._places, results, scores, events, copied)

    def _launch_mixed(
        self, rows: Sequence[BatchRow], places: Mapping[int, int], slots: Mapping[int, int]
    ) -> tuple[StepKind, Tensor | None, list[PromptScores]]:
        """Run rows of any kind; gives the logits of those that sample, and prompts' scores."""
        layout = mixed_layout(rows, places, slots, self._block_size)
        self._places = {row: place for place, row in enumerate(layout.sampled_rows)}
        size = self.mixed_graphs.size(layout, rows)
        if size is not None:
            self.mixed_graphs.fill(size, layout, self._clock.begin)
            logits = self.mixed_graphs.replay(size)
            return "graph", logits if self._places else None, []
        inputs = upload(layout, self._device, self._clock.begin)
        scores = any(row.scored_token_ids for row in rows)
        logits, hidden = self.run_mixed(inputs, keeps_all=scores)
        prompts = measure_prompts(rows, layout.order, partial(self._logits_of, hidden))
        return "eager", logits if self._places else None, prompts

    def run_mixed(self, inputs: MixedInputs, *, keeps_all: bool = False) -> tuple[Tensor, Stream]:
        """Launch a step with prompts: the logits of its sampled tokens, and what its layers leave.

        That is of all tokens with `keeps_all`, else of the sampled ones.
        """
        step = CudaStep(inputs.token_ids, inputs.sources, self._sampled, inputs.plan)
        wanted = inputs.sampled_tokens
        stream = self._model(self._ops, step, None if keeps_all else wanted)
        if not len(wanted):
            return wanted, stream
        logits = self._model.logits(self._ops, stream.select(wanted) if keeps_all else stream)
        choose(logits, inputs.sampling, self._workspace, self._sampled)
        return logits, stream

    def _logits_of(self, stream: Stream, first: int, count: int) -> Tensor:
        tokens = torch.arange(first, first + count, device=self._device)
        return self._model.logits(self._ops, stream.select(tokens))

    def run_decode(self, num_rows: int) -> Tensor:
        """Launch a decode step on the static buffers; what the graphs capture. Its logits."""
        buffers = self._buffers
        buffers.unpack(num_rows)
        step = CudaStep(
            buffers.token_ids[:num_rows],
            buffers.sources[:num_rows],
            self._sampled,
            buffers.plan(num_rows),
        )
        logits = self._model.logits(self._ops, self._model(self._ops, step))
        sampling, pdl = buffers.sampling(num_rows), num_rows <= self._ops.pdl_rows
        choose(logits, sampling, self._workspace, self._sampled, buffers.history, pdl=pdl)
        return logits
