"""Bias of single ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.sampling.processors.base import (
    DeviceBias,
    LogitsProcessor,
    flat_positions,
    id_array,
)


class LogitBias(LogitsProcessor):
    """`logit_bias`: a number is added to the logit of each listed id."""

    def wants(self, row: BatchRow) -> bool:
        """Rows that list ids."""
        return bool(row.sampling.logit_bias)

    def apply(self, logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
        """All rows in one gather and one scatter."""
        pairs = {i: row.sampling.logit_bias for i, row in rows.items()}
        ids = {i: id_array(token_id for token_id, _ in each) for i, each in pairs.items()}
        values = [value for each in pairs.values() for _, value in each]
        logits.view(-1)[flat_positions(ids, logits.shape[-1])] += torch.tensor(values)

    def add_bias(self, bias: DeviceBias, row: BatchRow) -> None:
        """The same."""
        bias.add(row.sampling.logit_bias)
