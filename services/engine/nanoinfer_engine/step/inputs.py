"""`Batch` → the flat tensors that the model and the attention backend read.

The tokens of all rows are laid end to end, row by row; nothing is padded but the block tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoinfer_engine.core.batch import Batch
from nanoinfer_engine.ops.attention import AttentionMetadata


@dataclass(frozen=True)
class StepInputs:
    """One step's tensors, on the model's device (attention metadata: see there)."""

    token_ids: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    sampled_tokens: Tensor  # [sampling rows]: index of each one's last token
    new_blocks: Tensor  # blocks whose first slot this step writes
    attention: AttentionMetadata


def build_inputs(batch: Batch, block_size: int, device: torch.device) -> StepInputs:
    """Flatten `batch`; every tensor is int64."""
    rows = batch.rows
    lengths = np.array([row.num_tokens for row in rows])
    starts = np.array([row.start for row in rows])
    query_starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=query_starts[1:])
    tables = _block_tables(batch)
    token_rows = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(query_starts[-1]) + (starts - query_starts[:-1])[token_rows]
    blocks = tables[token_rows, positions // block_size]
    offsets = positions % block_size
    samples = np.fromiter((row.samples for row in rows), dtype=np.bool_, count=len(rows))
    token_ids = np.fromiter(
        chain.from_iterable(row.token_ids for row in rows), np.int64, int(query_starts[-1])
    )

    def on_device(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(device)

    return StepInputs(
        token_ids=on_device(token_ids),
        positions=on_device(positions),
        sampled_tokens=on_device(query_starts[1:][samples] - 1),
        new_blocks=on_device(blocks[offsets == 0]),
        attention=AttentionMetadata(
            query_starts=torch.from_numpy(query_starts),
            context_lengths=torch.from_numpy(starts + lengths),
            block_tables=torch.from_numpy(tables),
            slots=on_device(blocks * block_size + offsets),
        ),
    )


def _block_tables(batch: Batch) -> NDArray[np.int64]:
    """[rows, max blocks]; a shorter row repeats its last block."""
    width = max(len(row.block_ids) for row in batch.rows)
    tables = np.empty((len(batch.rows), width), dtype=np.int64)
    for index, row in enumerate(batch.rows):
        count = len(row.block_ids)
        tables[index, :count] = row.block_ids
        tables[index, count:] = row.block_ids[-1]
    return tables
