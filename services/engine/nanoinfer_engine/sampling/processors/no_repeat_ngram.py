"""Ban on n-grams that have occurred already."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.sampling.processors.base import DeviceBias, LogitsProcessor, flat_positions

_NAME = "no_repeat_ngram_size"


class NoRepeatNgram(LogitsProcessor):
    """`no_repeat_ngram_size` n: ids are removed that would complete an n-gram for a second time.

    Prompt and completion count as one text, as in transformers. The last id decides, so a request
    does not run ahead.
    """

    options: ClassVar[Mapping[str, float]] = {_NAME: 0}

    def wants(self, row: BatchRow) -> bool:
        """Rows with n above 0."""
        return self.reads_token_ids(row.sampling)

    def apply(self, logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
        """All rows in one scatter."""
        ids = {i: _completing(row) for i, row in rows.items()}
        logits.view(-1)[flat_positions(ids, logits.shape[-1])] = -math.inf

    def add_bias(self, bias: DeviceBias, row: BatchRow) -> None:
        """The same."""
        bias.remove(_completing(row).tolist())

    def version(self, row: BatchRow) -> Hashable:
        """The ids that are removed: mostly none, step after step."""
        return _completing(row).tobytes() if self.wants(row) else None

    def reads_token_ids(self, sampling: SamplingOptions) -> bool:
        """Where n is above 0."""
        return bool(sampling.extensions) and sampling.extension(_NAME, 0) > 0


def _completing(row: BatchRow) -> NDArray[np.int64]:
    """The different ids that followed an earlier occurrence of the last n - 1 ids, ascending."""
    if len(row.known_token_ids) != row.context_length:
        raise SamplingError("the row does not bring all ids of its request")
    size = int(row.sampling.extension(_NAME, 0))
    ids = np.array(row.known_token_ids, dtype=np.int64)
    starts = np.arange(len(ids) - size + 1)
    for place in range(size - 1) if len(starts) else ():
        starts = starts[ids[starts + place] == ids[len(ids) - size + 1 + place]]
    return np.unique(ids[starts + size - 1])
