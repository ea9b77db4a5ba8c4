"""Steps with prompts in them as CUDA graphs: padded to fixed sizes, captured before serving.

So a small step costs the host one launch instead of some 300. A graph has room for `decode_rows`
rows of one token, then for `prompt_tokens` tokens of prompts. What is not used is padding: rows
without a context, tokens without a slot, a prompt of no tokens that tiles without work belong to,
and rows that choose an id that nobody reads. Sizes at which the device takes longer than the host
are left out: there padding costs more than launches.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.ops.cuda.attention import PagedPlan
from nanoinfer_engine.ops.cuda.kernels.prompts import QUERY_TILE
from nanoinfer_engine.step.cuda_graphs import CapturedSteps
from nanoinfer_engine.step.device_inputs import (
    SAMPLING_FIELDS,
    Ints,
    MixedInputs,
    MixedLayout,
    device_sampling,
    prompt_plan,
)

_LOG = logging.getLogger(__name__)

MAX_PROMPTS = 32
_DECODE_ROWS = (0, 16, 64, 128)  # and as many as a step may have
_LEAST_PROMPT = 48
# the last one for 2,048 tokens, some of them decode rows, with the padding of up to 256 rows
_TOKENS = (*range(64, 640, 64), *range(640, 1280, 128), 1280, 1536, 1792, 2048, 2176)
# of a row; longer tables would take longer to bring than launches take
_MAX_BLOCKS = 1024
# so many times as long as the host at most: in the service other threads delay the launches
_WORTH = 1.5


@dataclass(frozen=True, order=True)
class MixedSize:
    """What a graph has room for: `num_tokens`, of them `decode_rows` as rows of one token."""

    num_tokens: int
    decode_rows: int

    @property
    def prompt_tokens(self) -> int:
        """What is left for prompts."""
        return self.num_tokens - self.decode_rows


@dataclass(frozen=True)
class _Field:
    """An array in static memory: where it begins, and what it holds where it is not used."""

    start: int
    shape: tuple[int, ...]
    padding: Ints

    @property
    def stop(self) -> int:
        """Where the next may begin, at a multiple of 16 bytes."""
        return self.start + _in_fours(math.prod(self.shape))

    def of(self, memory: Tensor) -> Tensor:
        """Its part of the memory."""
        return memory[self.start : self.start + math.prod(self.shape)].view(self.shape)


class MixedGraphs:
    """Captured steps by size, over one piece of static memory that a step is copied into."""

    def __init__(
        self,
        captured: CapturedSteps,
        max_rows: int,
        max_tokens: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        """A step has `max_rows` rows and `max_tokens` tokens at most, a row `max_blocks` blocks."""
        self._captured, self._device = captured, device
        self._max_rows, self._max_blocks = max_rows, min(max_blocks, _MAX_BLOCKS)
        rows = sorted({*(min(count, max_rows) for count in _DECODE_ROWS), max_rows})
        padding = max(more - fewer for fewer, more in itertools.pairwise(rows)) - 1
        self._tokens = _TOKENS[: bisect_left(_TOKENS, max_tokens + padding) + 1]
        sizes = [MixedSize(tokens, count) for tokens in self._tokens for count in rows]
        self._sizes = [size for size in sizes if size.prompt_tokens >= _LEAST_PROMPT]
        self._fields = {size: self._lay_out(size) for size in self._sizes}
        length = max(fields[-1].stop for fields in self._fields.values())
        self._memory = torch.zeros(length, dtype=torch.int32, device=device)

    @property
    def sizes(self) -> tuple[MixedSize, ...]:
        """The captured sizes, ascending."""
        return tuple(size for size in self._sizes if size in self._captured)

    def capture(self, run: Callable[[MixedInputs], Tensor]) -> None:
        """Capture `run` where its launches take long, the largest size first, as memory lasts.

        How long it takes is measured with padding alone: without what its attention takes.
        """

        def is_in_vain(tokens: int) -> bool:
            return _device_lag(partial(run, self._nothing(MixedSize(tokens, 0)))) >= _WORTH

        most = bisect_left(self._tokens, True, key=is_in_vain)
        for size in reversed(self._sizes):
            if size.num_tokens not in self._tokens[:most]:
                continue
            if not self._captured.capture(size, partial(run, self._nothing(size))):
                break
        _LOG.debug("captured %d sizes of steps with prompts: %s", len(self.sizes), self.sizes[-1:])

    def size(self, layout: MixedLayout, rows: Sequence[BatchRow]) -> MixedSize | None:
        """The smallest captured size with room for the step of these `rows`; None without."""
        num_decodes, num_prompts = layout.num_decode_rows, len(rows) - layout.num_decode_rows
        if not 0 < num_prompts <= MAX_PROMPTS:
            return None
        if any(row.scored_token_ids or len(row.block_ids) > self._max_blocks for row in rows):
            return None
        num_tokens = len(layout.token_ids) - num_decodes
        for size in self._sizes:
            has_room = size.decode_rows >= num_decodes and size.prompt_tokens >= num_tokens
            if has_room and size in self._captured:
                return size
        return None

    def fill(self, size: MixedSize, layout: MixedLayout, begin: Callable[[], None]) -> None:
        """Bring a step into the static memory; `begin` is called just before the copy."""
        on_host = self._padding(size)
        for field, values in zip(self._fields[size], _arrays(size, layout), strict=True):
            field.of(on_host).numpy()[tuple(slice(length) for length in values.shape)] = values
        begin()
        self._copy(on_host)

    def replay(self, size: MixedSize) -> Tensor:
        """Launch the step that `fill` has brought; its logits, to be read before the next one."""
        return self._captured.replay(size)

    def inputs(self, size: MixedSize) -> MixedInputs:
        """What a step of `size` reads: views of the static memory."""
        views = [field.of(self._memory) for field in self._fields[size]]
        token_ids, origin, tables, contexts, sampled_tokens, options, *prompts = views
        plan = PagedPlan(size.decode_rows, tables, contexts, prompt_plan(prompts, None))
        sampling = device_sampling(options[:, : len(sampled_tokens)])
        return MixedInputs(token_ids, origin, plan, sampled_tokens, sampling)

    def _nothing(self, size: MixedSize) -> MixedInputs:
        """The same, all of it padding."""
        self._copy(self._padding(size))
        return self.inputs(size)

    def _padding(self, size: MixedSize) -> Tensor:
        """A step of nothing, on the host; new memory, for the last may still be on its way."""
        fields, pinned = self._fields[size], self._device.type == "cuda"
        on_host = torch.empty(fields[-1].stop, dtype=torch.int32, pin_memory=pinned)
        for field in fields:
            field.of(on_host).numpy()[...] = field.padding
        return on_host

    def _copy(self, on_host: Tensor) -> None:
        self._memory[: len(on_host)].copy_(on_host, non_blocking=True)

    def _lay_out(self, size: MixedSize) -> list[_Field]:
        rows, tokens, width = size.decode_rows, size.prompt_tokens, self._max_blocks
        sampled = min(rows + MAX_PROMPTS, self._max_rows)
        options = np.zeros((SAMPLING_FIELDS, 1), dtype=np.int32)
        options[1] = -1  # no slot
        shapes: list[tuple[tuple[int, ...], object]] = [
            ((size.num_tokens,), 0),  # ids
            ((size.num_tokens,), -1),  # sources
            ((rows, width), 0),  # tables
            ((rows,), 0),  # contexts
            ((sampled,), 0),  # sampled tokens
            ((SAMPLING_FIELDS, _in_fours(sampled)), options),
            ((tokens,), -1),  # what a PromptPlan has: slots
            ((tokens,), 0),  # positions
            ((MAX_PROMPTS + 2,), 0),  # query starts
            ((MAX_PROMPTS + 1,), 0),  # contexts
            ((MAX_PROMPTS + 1, width), 0),  # tables
            ((tokens // QUERY_TILE + MAX_PROMPTS, 2), (MAX_PROMPTS, 0)),  # tiles
        ]
        fields: list[_Field] = []
        for shape, padding in shapes:
            start = fields[-1].stop if fields else 0
            fields.append(_Field(start, shape, np.asarray(padding, dtype=np.int32)))
        return fields


def _arrays(size: MixedSize, layout: MixedLayout) -> Iterator[Ints]:
    """What goes into the fields of `size`, in their order."""
    count, gap = layout.num_decode_rows, size.decode_rows - layout.num_decode_rows
    yield np.insert(layout.token_ids, count, np.zeros(gap, np.int32))
    yield np.insert(layout.sources, count, np.full(gap, -1, np.int32))
    yield layout.tables
    yield layout.contexts
    sampled = layout.sampled_tokens
    yield np.where(sampled < count, sampled, sampled + gap)
    yield layout.sampling
    slots, positions, query_starts, *rest = layout.prompts
    yield slots
    yield positions
    # prompts that are not there begin where the last one ends
    none = np.full(MAX_PROMPTS + 2 - len(query_starts), query_starts[-1], dtype=np.int32)
    yield np.concatenate([query_starts, none])
    yield from rest


def _in_fours(count: int) -> int:
    """The next multiple of four."""
    return -(-count // 4) * 4


def _device_lag(run: Callable[[], object], repeats: int = 3) -> float:
    """How many times as long the device takes to end `run` as the host to launch it.

    1 where the device waits for launches; the median, so that compiling does not count.
    """
    lags: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        launched = time.perf_counter() - began
        torch.cuda.synchronize()
        lags.append((time.perf_counter() - began) / launched)
    return float(statistics.median(lags))
