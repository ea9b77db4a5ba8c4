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

from nanoinfer_engine.attention.paged import PagedPlan, PromptPlan
from nanoinfer_engine.batch import BatchRow
from nanoinfer_engine.kernels.prompts import query_tiles
from nanoinfer_engine.kernels.sampling import DeviceSampling
from nanoinfer_engine.sampler import GREEDY_BELOW

Ints = NDArray[np.int32]

SAMPLING_FIELDS = 9
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
    """Views of what `sampling_arrays` gave, [9, rows] int32 on the device."""
    top_k, slot = fields[:2]
    return DeviceSampling(top_k, slot, *fields[2:].view(torch.float32))


def sampling_arrays(rows: Sequence[BatchRow], slots: Mapping[int, int]) -> Ints:
    """[9, rows]: the fields of `DeviceSampling`, floats by their bits.

    `slots` has the rows that are shaped, by their index.
    """
    options = [row.sampling for row in rows]
    arrays = np.zeros((SAMPLING_FIELDS, len(rows)), dtype=np.int32)
    arrays[0] = [each.top_k for each in options]
    arrays[1] = -1
    floats = arrays[2:].view(np.float32)
    floats[0] = [each.temperature for each in options]
    floats[0][floats[0] < GREEDY_BELOW] = 0
    floats[1] = [each.top_p for each in options]
    floats[2] = [each.min_p for each in options]
    if floats[0].any():
        seeds = np.array([each.seed & (2**64 - 1) for each in options], dtype=np.uint64)
        floats[3] = uniforms(seeds, np.array([row.context_length for row in rows], dtype=np.uint64))
    for index, slot in slots.items():
        own = options[index]
        arrays[1, index] = slot
        penalties = own.repetition_penalty, own.frequency_penalty, own.presence_penalty
        floats[4:, index] = penalties
    return arrays


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float32]:
    """`sampler.uniform` of each pair, rounded towards 0 so that it stays below 1."""
    mixed = _splitmix64(_splitmix64(seeds) ^ positions)
    return ((mixed >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


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
class MixedInputs:
    """A step with prompts in it, on the device; `order` are the batch's rows as they stand here."""

    order: tuple[int, ...]
    token_ids: Tensor
    sources: Tensor
    plan: PagedPlan
    sampled_rows: tuple[int, ...]  # rows of the batch, in the order of their logits
    sampled_tokens: Tensor
    sampling: DeviceSampling


class _Packer:
    """Collects arrays, copies them to the device at once and hands out views."""

    def __init__(self) -> None:
        self._arrays: list[Ints] = []

    def add(self, values: Sequence[int] | NDArray[np.int64] | Ints) -> int:
        self._arrays.append(np.asarray(values, dtype=np.int32).reshape(-1))
        return len(self._arrays) - 1

    def upload(self, device: torch.device, begin: Callable[[], None]) -> list[Tensor]:
        # every array starts at a multiple of 16 bytes, for kernels that load in vectors
        padded = [np.pad(array, (0, -len(array) % 4)) for array in self._arrays]
        on_host = torch.from_numpy(np.concatenate(padded))
        if device.type == "cuda":
            on_host = on_host.pin_memory()
        begin()
        on_device = on_host.to(device, non_blocking=True)
        ends = np.cumsum([len(array) for array in padded]).tolist()
        return [
            on_device[end - len(wide) : end - len(wide) + len(array)]
            for end, wide, array in zip(ends, padded, self._arrays, strict=True)
        ]


def mixed_inputs(
    rows: Sequence[BatchRow],
    places: Mapping[int, int],
    slots: Mapping[int, int],
    block_size: int,
    device: torch.device,
    begin: Callable[[], None],
) -> MixedInputs:
    """Lay out a step of any mix; `slots` by index in `rows`, `places` as in `sources`.

    `begin` is called just before the copy, the first that the device has to do with the step.
    """
    late = reads_new_blocks(rows, block_size)
    is_prompt = [row.num_tokens > 1 or index in late for index, row in enumerate(rows)]
    order = sorted(range(len(rows)), key=lambda index: is_prompt[index])
    ordered = [rows[index] for index in order]
    decoding = ordered[: is_prompt.count(False)]
    prompts = ordered[len(decoding) :]
    packer = _Packer()
    lengths = np.array([row.num_tokens for row in ordered])
    ends = np.cumsum(lengths)
    ids = chain.from_iterable(row.token_ids or (0,) for row in ordered)
    token_ids = packer.add(np.fromiter(ids, np.int32, int(ends[-1])))
    origin = np.full(ends[-1], -1)
    origin[: len(decoding)] = sources(decoding, places)
    source = packer.add(origin)
    sampled = [i for i, row in enumerate(ordered) if row.samples]
    sampled_tokens = packer.add(ends[sampled] - 1)
    sampled_rows = tuple(order[i] for i in sampled)
    own_slots = {i: slots[row] for i, row in enumerate(sampled_rows) if row in slots}
    arrays = sampling_arrays([rows[i] for i in sampled_rows], own_slots)
    # each field at a multiple of 16 bytes: one compiled kernel serves any number of rows
    options = packer.add(np.pad(arrays, ((0, 0), (0, -len(sampled_rows) % 4))))
    width = max((len(row.block_ids) for row in decoding), default=1)
    tables = packer.add(block_tables(decoding, width))
    contexts = packer.add([row.context_length for row in decoding])
    prompt_arrays = [packer.add(each) for each in _prompt_arrays(prompts, block_size)]
    parts = packer.upload(device, begin)
    plan = PagedPlan(
        len(decoding),
        parts[tables].view(len(decoding), width),
        parts[contexts],
        _prompt_plan(prompts, [parts[i] for i in prompt_arrays]),
    )
    return MixedInputs(
        tuple(order),
        parts[token_ids],
        parts[source],
        plan,
        sampled_rows,
        parts[sampled_tokens],
        device_sampling(parts[options].view(SAMPLING_FIELDS, -1)),
    )


def _prompt_arrays(prompts: Sequence[BatchRow], block_size: int) -> list[NDArray[np.int64] | Ints]:
    """What a `PromptPlan` holds, in its order."""
    if not prompts:
        return []
    slots, positions = [], []
    for row in prompts:
        own = np.arange(row.start, row.context_length)
        blocks = np.asarray(row.block_ids, dtype=np.int64)
        slots.append(blocks[own // block_size] * block_size + own % block_size)
        positions.append(own)
    lengths = np.array([row.num_tokens for row in prompts])
    contexts = np.array([row.context_length for row in prompts])
    width = max(len(row.block_ids) for row in prompts)
    return [
        np.concatenate(slots),
        np.concatenate(positions),
        np.cumsum([0, *lengths]),
        contexts,
        block_tables(prompts, width),
        query_tiles(lengths, contexts),
    ]


def _prompt_plan(prompts: Sequence[BatchRow], parts: Sequence[Tensor]) -> PromptPlan | None:
    if not prompts:
        return None
    slots, positions, query_starts, contexts, tables, tiles = parts
    lengths = {row.num_tokens if row.start == 0 else None for row in prompts}
    return PromptPlan(
        slots,
        positions,
        query_starts,
        contexts,
        tables.view(len(prompts), -1),
        tiles.view(-1, 2),
        equal_length=lengths.pop() if len(lengths) == 1 else None,
    )
