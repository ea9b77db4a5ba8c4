"""Penalties for ids that have occurred: repetition, frequency, presence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.request import TokenCounts
from nanoinfer_engine.sampling.processors.base import (
    DeviceBias,
    Entries,
    LogitsProcessor,
    flat_positions,
)

# Penalised logits stay within it: the smallest temperature cannot carry them out of float32.
_LARGEST = 1e30


class Penalties(LogitsProcessor):
    """Repetition (CTRL, arXiv 1909.05858), then frequency and presence (as OpenAI defines them).

    Repetition concerns prompt and completion, the other two the completion alone.
    """

    def wants(self, row: BatchRow) -> bool:
        """Rows with penalties bring the counts of their ids."""
        return row.token_counts is not None

    def apply(self, logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
        """Only the ids concerned are read and written, in one gather and one scatter."""
        counts = [row.token_counts for row in rows.values() if row.token_counts is not None]
        ids = dict(zip(rows, (np.array(each.token_ids) for each in counts), strict=True))
        positions = flat_positions(ids, logits.shape[-1])
        times = torch.from_numpy(np.concatenate([np.array(each.counts) for each in counts])).float()
        lengths = torch.tensor([len(each) for each in ids.values()])
        options = [row.sampling for row in rows.values()]
        penalties = [
            (each.repetition_penalty, each.frequency_penalty, each.presence_penalty)
            for each in options
        ]
        repetition, frequency, presence = torch.tensor(penalties).repeat_interleave(lengths, 0).T
        values = logits.view(-1)[positions]
        values = torch.where(values < 0, values * repetition, values / repetition)
        values -= frequency * times + presence * (times > 0)
        logits.view(-1)[positions] = values.clamp(-_LARGEST, _LARGEST)

    def add_bias(self, bias: DeviceBias, row: BatchRow) -> None:
        """Nothing: a product is no summand. The kernels read `count_entries` and the options."""


def count_entries(counts: TokenCounts | None) -> Entries:
    """The ids of prompt and completion as the kernels count them: twice, and 1 for the prompt."""
    if counts is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    times = np.array(counts.counts, dtype=np.int32)
    return np.array(counts.token_ids), np.maximum(2 * times, np.int32(1))
