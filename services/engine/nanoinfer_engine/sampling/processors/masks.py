"""Removal of ids: those that are not allowed, and those that would end a completion too early."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import numpy as np
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.sampling.processors.base import (
    DeviceBias,
    LogitsProcessor,
    flat_positions,
    id_array,
)


class AllowedIds(LogitsProcessor):
    """`allowed_token_ids`: every other id is removed."""

    def wants(self, row: BatchRow) -> bool:
        """Rows with a list, be it empty."""
        return row.sampling.allowed_token_ids is not None

    def apply(self, logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
        """Set aside what is kept, remove all, put it back."""
        ids = {
            i: np.array(row.sampling.allowed_token_ids, dtype=np.int64) for i, row in rows.items()
        }
        positions = flat_positions(ids, logits.shape[-1])
        kept = logits.view(-1)[positions]
        logits[list(ids)] = -math.inf
        logits.view(-1)[positions] = kept

    def add_bias(self, bias: DeviceBias, row: BatchRow) -> None:
        """The same."""
        bias.keep(row.sampling.allowed_token_ids or ())


class HeldBackIds(LogitsProcessor):
    """`min_tokens`: the row's `masked_token_ids` are removed."""

    def wants(self, row: BatchRow) -> bool:
        """Rows before their minimum."""
        return bool(row.masked_token_ids)

    def apply(self, logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
        """All rows in one scatter."""
        ids = {i: id_array(row.masked_token_ids) for i, row in rows.items()}
        logits.view(-1)[flat_positions(ids, logits.shape[-1])] = -math.inf

    def add_bias(self, bias: DeviceBias, row: BatchRow) -> None:
        """The same."""
        bias.remove(row.masked_token_ids)

    def version(self, row: BatchRow) -> Hashable:
        """The ids: none any more once the minimum is reached."""
        return row.masked_token_ids
