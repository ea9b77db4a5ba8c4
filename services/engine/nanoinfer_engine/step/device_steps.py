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
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SampledToken, SamplingOptions
from nanoinfer_engine.models.fused import FusedDecoder
from nanoinfer_engine.models.fused_layer import Hidden, StepTokens
from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.ops.cuda.choices import ChoiceFile
from nanoinfer_engine.ops.cuda.kernels.sampling import SamplingWorkspace, choose
from nanoinfer_engine.ops.cuda.linears import REFINED_ROWS
from nanoinfer_engine.ops.cuda.tuning import time_graph
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
# beyond these rows the launches are long enough to hide one another; with several ranks none starts
# early, because NCCL's kernels stand between ours
_PDL_ROWS = 64
_REFINED_CONTEXT = 640
GREEDY = SamplingOptions(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


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
                if self._results[row] is None:
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
    return SampledToken(token_id)


class DeviceSteps:
    """Launches steps over one model and cache."""

    def __init__(
        self,
        decoder: FusedDecoder,
        vocab_size: int,
        block_size: int,
        max_rows: int,
        max_tokens: int,
        max_model_len: int,
        num_blocks: int,
        device: torch.device,
        choices: ChoiceFile,
        rank: Rank = ALONE,
        mixed_graphs: bool = False,
    ) -> None:
        """A step has `max_rows` rows and `max_tokens` tokens at most, a row `max_model_len` tokens.

        `num_blocks` are all that there are. With `mixed_graphs` small steps with prompts are
        graphs, too, on one device: with several that has not been tried.
        """
        self._rank, self._choices = rank, choices
        self._pdl_rows = _PDL_ROWS if rank.size == 1 else 0
        self._decoder, self._block_size, self._device = decoder, block_size, device
        max_blocks = -(-max_model_len // block_size)
        self._buffers = DecodeBuffers(max_rows, max_blocks, device)
        self._workspace = SamplingWorkspace(max_rows, vocab_size, device)
        self._slots = ShapingSlots(self._workspace.counts, self._workspace.bias)
        self._sampled = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._places: dict[int, int] = {}  # of the last step's rows in `_sampled`
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._max_model_len, self._num_blocks = max_model_len, num_blocks
        captured = CapturedSteps(_GRAPH_MEMORY, rank.least)
        self.graphs = DecodeGraphs(captured)
        self.mixed_graphs = MixedGraphs(captured, max_rows, max_tokens, max_blocks, device)
        self._captures_mixed = mixed_graphs and rank.size == 1
        self._clock = DeviceClock()

    def prepare(self) -> None:
        """Choose kernels, capture the graphs; what exists then is never collected."""
        if not self._decoder.restore(self._choices.read() or {}):
            self._decoder.tune(self._max_rows, self._max_tokens, self._pdl_rows)
            torch.cuda.empty_cache()  # of prompts as long as any
            if self._rank.size == 1:  # several would have to measure the same steps
                self._refine()
            self._choices.write(self._decoder.choices)
        self.graphs.capture(self.run_decode, padded_sizes(self._max_rows))
        self._buffers.rewind()
        if self._captures_mixed:
            self.mixed_graphs.capture(lambda inputs: self.run_mixed(inputs)[0])
        # a full collection over all that torch has made stops the steps for tens of milliseconds
        gc.collect()
        gc.freeze()

    def _refine(self) -> None:
        """Choose again among the best within whole steps: kernels overlap their neighbours."""
        context = min(_REFINED_CONTEXT, self._max_model_len, self._num_blocks * self._block_size)
        width = -(-context // self._block_size)
        for rows in REFINED_ROWS:
            if rows <= self._max_rows:
                made_up = [
                    BatchRow(
                        (0,),
                        context - 1,
                        tuple((row * width + i) % self._num_blocks for i in range(width)),
                        samples=True,
                        sampling=GREEDY,
                    )
                    for row in range(rows)
                ]
                self._buffers.fill_all(made_up)
                step = partial(self.run_decode, rows)
                self._decoder.table.refine(rows, partial(time_graph, step))
        torch.cuda.empty_cache()

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
        results = [failed.get(row) for row in range(len(rows))]
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
        results = [failed.get(row) for row in range(count)]
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

    def run_mixed(self, inputs: MixedInputs, *, keeps_all: bool = False) -> tuple[Tensor, Hidden]:
        """Launch a step with prompts: the logits of its sampled tokens, and what its layers leave.

        That is of all tokens with `keeps_all`, else of the sampled ones.
        """
        tokens = StepTokens(inputs.token_ids, inputs.sources, self._sampled)
        wanted = inputs.sampled_tokens
        # the same kernels as a decode step of so many rows runs: compiled before
        pdl = len(wanted) <= self._pdl_rows
        kept = None if keeps_all else wanted
        hidden = self._decoder.forward(tokens, inputs.plan, kept=kept, kept_pdl=pdl)
        if not len(wanted):
            return wanted, hidden
        own = hidden.select(wanted) if keeps_all else hidden
        logits = self._decoder.logits(own, pdl=pdl)
        choose(logits, inputs.sampling, self._workspace, self._sampled)
        return logits, hidden

    def _logits_of(self, hidden: Hidden, first: int, count: int) -> Tensor:
        tokens = torch.arange(first, first + count, device=self._device)
        return self._decoder.logits(hidden.select(tokens))

    def run_decode(self, num_rows: int) -> Tensor:
        """Launch a decode step on the static buffers; what the graphs capture. Its logits."""
        pdl, buffers = num_rows <= self._pdl_rows, self._buffers
        buffers.unpack(num_rows)
        tokens = StepTokens(buffers.token_ids[:num_rows], buffers.sources[:num_rows], self._sampled)
        hidden = self._decoder.forward(tokens, buffers.plan(num_rows), pdl=pdl)
        logits = self._decoder.logits(hidden, pdl=pdl)
        sampling, history = buffers.sampling(num_rows), buffers.history
        choose(logits, sampling, self._workspace, self._sampled, history, pdl=pdl)
        return logits
