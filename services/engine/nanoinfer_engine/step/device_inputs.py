"""`Batch` → the packed integers that one copy brings to the device.

Decode rows come first, whatever their order in the batch; everything is int32, floats by their
bits. Decode steps have a fixed layout in static memory (`decode_buffers`); mixed steps are laid out
anew each time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.ops.cuda.attention import PagedPlan, PromptPlan
from nanoinfer_engine.ops.cuda.kernels.prompts import query_tiles
from nanoinfer_engine.ops.cuda.kernels.sampling import DeviceSampling
from nanoinfer_engine.sampling.randomness import row_keys
from nanoinfer_engine.sampling.sampler import GREEDY_BELOW

Ints = NDArray[np.int32]

SAMPLING_FIELDS = 10
"""Fields of a row that say how it chooses, as `DeviceSampling` has them."""


def sources(rows: Sequence[BatchRow], places: Mapping[int, int]) -> list[int]:
    """Where each row's last token lies among the ids just sampled; -1 where the host knows it."""
    return [-1 if row.source_row is None else places[row.source_row] for row in rows]


def block_tables(rows: Sequence[BatchRow], width: int) -> Ints:
    """[rows, width], padded with block 0, which is never read there."""
    size = 4 * width
    padded = [array("i", row.block_ids).tobytes().ljust(size, b"\0") for row in rows]
    return np.frombuffer(b"".join(padded), dtype=np.int32).reshape(len(rows), width)


def device_sampling(fields: Tensor) -> DeviceSampling:
    """Views of what `sampling_arrays` gave, [10, rows] int32 on the device."""
    return DeviceSampling(*fields[:4], *fields[4:].view(torch.float32))


def sampling_arrays(rows: Sequence[BatchRow], slots: Mapping[int, int]) -> Ints:
    """[10, rows]: the fields of `DeviceSampling`, floats by their bits.

    `slots` has the rows that are shaped, by their index.
    """
    options = [row.sampling for row in rows]
    arrays = np.zeros((SAMPLING_FIELDS, len(rows)), dtype=np.int32)
    arrays[0] = [each.top_k for each in options]
    arrays[1] = -1
    floats = arrays[4:].view(np.float32)
    floats[0] = [each.temperature for each in options]
    floats[0][floats[0] < GREEDY_BELOW] = 0
    floats[1] = [each.top_p for each in options]
    floats[2] = [each.min_p for each in options]
    if floats[0].any():
        arrays[2:4] = row_keys(rows).view(np.int32)
    for index, slot in slots.items():
        own = options[index]
        arrays[1, index] = slot
        penalties = own.repetition_penalty, own.frequency_penalty, own.presence_penalty
        floats[3:, index] = penalties
    return arrays


def reads_new_blocks(rows: Sequence[BatchRow], block_size: int) -> set[int]:
    """Rows of one token that see blocks which other rows of this very step write.

    Only a row that has just started can: the prefix cache gave it blocks that are being filled. Its
    attention must come after all writes, so it stands among the prompts.
    """
    starts = [index for index, row in enumerate(rows) if row.source_row is None and row.start]
    suspects = [index for index in starts if rows[index].num_tokens == 1]
    if not suspects:
        return set()
    written = {block for row in rows for block in row.block_ids[row.start // block_size :]}
    return {
        index
        for index in suspects
        if not written.isdisjoint(rows[index].block_ids[: rows[index].start // block_size])
    }


@dataclass(frozen=True)
class MixedLayout:
    """A step with prompts in it as arrays, int32: decode rows first, whatever their order before.

    `order` are the batch's rows as they stand here. `prompts` is what a `PromptPlan` holds, in its
    order; `sampled_rows` are rows of the batch, in the order of their logits.
    """

    order: tuple[int, ...]
    num_decode_rows: int
    token_ids: Ints  # [tokens]
    sources: Ints  # [tokens]
    tables: Ints  # [decode rows, any]
    contexts: Ints  # [decode rows]
    prompts: tuple[Ints, ...]
    equal_length: int | None
    sampled_rows: tuple[int, ...]
    sampled_tokens: Ints  # [sampled rows]
    sampling: Ints  # [10, sampled rows]


def mixed_layout(
    rows: Sequence[BatchRow],
    places: Mapping[int, int],
    slots: Mapping[int, int],
    block_size: int,
) -> MixedLayout:
    """Lay out a step of any mix; `slots` by index in `rows`, `places` as in `sources`."""
    late = reads_new_blocks(rows, block_size)
    is_prompt = [row.num_tokens > 1 or index in late for index, row in enumerate(rows)]
    order = sorted(range(len(rows)), key=lambda index: is_prompt[index])
    ordered = [rows[index] for index in order]
    decoding = ordered[: is_prompt.count(False)]
    prompts = ordered[len(decoding) :]
    ends = np.cumsum([row.num_tokens for row in ordered])
    ids = chain.from_iterable(row.token_ids or (0,) for row in ordered)
    origin = np.full(ends[-1], -1, dtype=np.int32)
    origin[: len(decoding)] = sources(decoding, places)
    sampled = [i for i, row in enumerate(ordered) if row.samples]
    sampled_rows = tuple(order[i] for i in sampled)
    own_slots = {i: slots[row] for i, row in enumerate(sampled_rows) if row in slots}
    width = max((len(row.block_ids) for row in decoding), default=1)
    lengths = {row.num_tokens if row.start == 0 else None for row in prompts}
    return MixedLayout(
        tuple(order),
        len(decoding),
        np.fromiter(ids, np.int32, int(ends[-1])),
        origin,
        block_tables(decoding, width),
        np.array([row.context_length for row in decoding], dtype=np.int32),
        _prompt_arrays(prompts, block_size) if prompts else (),
        lengths.pop() if len(lengths) == 1 else None,
        sampled_rows,
        (ends[sampled] - 1).astype(np.int32),
        sampling_arrays([rows[i] for i in sampled_rows], own_slots),
    )


def _prompt_arrays(prompts: Sequence[BatchRow], block_size: int) -> tuple[Ints, ...]:
    slots, positions = [], []
    for row in prompts:
        own = np.arange(row.start, row.context_length)
        blocks = np.asarray(row.block_ids, dtype=np.int64)
        slots.append(blocks[own // block_size] * block_size + own % block_size)
        positions.append(own)
    lengths = np.array([row.num_tokens for row in prompts])
    contexts = np.array([row.context_length for row in prompts])
    width = max(len(row.block_ids) for row in prompts)
    arrays = (
        np.concatenate(slots),
        np.concatenate(positions),
        np.cumsum([0, *lengths]),
        contexts,
        block_tables(prompts, width),
        query_tiles(lengths, contexts),
    )
    return tuple(array.astype(np.int32, copy=False) for array in arrays)


@dataclass(frozen=True)
class MixedInputs:
    """What a mixed step reads, on the device."""

    token_ids: Tensor
    sources: Tensor
    plan: PagedPlan
    sampled_tokens: Tensor
    sampling: DeviceSampling


def upload(layout: MixedLayout, device: torch.device, begin: Callable[[], None]) -> MixedInputs:
    """Bring a step to memory of its own, in one copy; `begin` is called just before it."""
    # each field at a multiple of 16 bytes: one compiled kernel serves any number of rows
    count = len(layout.sampled_rows)
    sampling = np.pad(layout.sampling, ((0, 0), (0, -count % 4)))
    arrays = [layout.token_ids, layout.sources, layout.tables, layout.contexts]
    arrays += [layout.sampled_tokens, sampling, *layout.prompts]
    padded = [np.pad(array.reshape(-1), (0, -array.size % 4)) for array in arrays]
    on_host = torch.from_numpy(np.concatenate(padded))
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    begin()
    on_device = on_host.to(device, non_blocking=True)
    ends = np.cumsum([len(array) for array in padded])
    token_ids, origin, tables, contexts, sampled_tokens, options, *prompts = (
        on_device[end - len(wide) : end - len(wide) + array.size].view(array.shape)
        for end, wide, array in zip(ends.tolist(), padded, arrays, strict=True)
    )
    attending = prompt_plan(prompts, layout.equal_length) if prompts else None
    plan = PagedPlan(layout.num_decode_rows, tables, contexts, attending)
    return MixedInputs(token_ids, origin, plan, sampled_tokens, device_sampling(options))


def prompt_plan(parts: Sequence[Tensor], equal_length: int | None) -> PromptPlan:
    """The plan of what `MixedLayout.prompts` brought to the device."""
    slots, positions, query_starts, contexts, tables, tiles = parts
    return PromptPlan(slots, positions, query_starts, contexts, tables, tiles, equal_length)
