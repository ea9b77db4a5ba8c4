"""The host's path of the logits processors: all rows of a step together, in their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.sampling.processors import PROCESSORS, is_shaped


def shape(logits: Tensor, rows: Sequence[BatchRow]) -> Tensor:
    """`logits` [rows, vocabulary] float32 on the host, or a copy in which what rows ask is done.

    Raises SamplingError for an id outside the vocabulary.
    """
    concerned = {index: row for index, row in enumerate(rows) if is_shaped(row)}
    if not concerned:
        return logits
    shaped = logits.clone(memory_format=torch.contiguous_format)
    for processor in PROCESSORS:
        own = {index: row for index, row in concerned.items() if processor.wants(row)}
        if own:
            processor.apply(shaped, own)
    return shaped
