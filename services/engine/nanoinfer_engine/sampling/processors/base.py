"""Interface of a logits processor, and what processors have in common.

A processor changes the logits of the rows that ask for it, before temperature, filters and draw.
On the host it does so with PyTorch. On a device the kernels do it for all processors together, from
two tables: how often ids have occurred, for the penalties, and what is added to each logit
afterwards, which any processor may write.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.errors import SamplingError
from nanoinfer_engine.core.request import SamplingOptions

Entries = tuple[NDArray[np.int64], NDArray[np.int32] | NDArray[np.float32]]
"""Ids, and the value that a row of a device's table has for each."""


@dataclass
class DeviceBias:
    """Summand of each logit of a row on the device: `base`, but `values` for the ids listed there.

    Minus infinity removes an id. Processors change it in the order in which they run.
    """

    base: float = 0.0
    values: dict[int, float] = field(default_factory=dict)

    def add(self, pairs: Iterable[tuple[int, float]]) -> None:
        """Add to the logits of these ids."""
        for token_id, value in pairs:
            self.values[token_id] = self.values.get(token_id, self.base) + value

    def keep(self, token_ids: Iterable[int]) -> None:
        """Remove all other ids."""
        kept = dict.fromkeys(token_ids, self.base)
        kept |= {each: value for each, value in self.values.items() if each in kept}
        self.base, self.values = -math.inf, kept

    def remove(self, token_ids: Iterable[int]) -> None:
        """Remove these ids."""
        self.values |= dict.fromkeys(token_ids, -math.inf)

    def entries(self) -> Entries:
        """The listed ids with their summands."""
        count = len(self.values)
        ids = np.fromiter(self.values, np.int64, count)
        return ids, np.fromiter(self.values.values(), np.float32, count)


class LogitsProcessor(ABC):
    """One change of the logits, the same on every device. Without state: rows bring all it reads.

    `options` names the fields of the contract's SamplingParams that reach the processor as
    `SamplingOptions.extensions`, each with the value that asks for nothing.
    """

    options: ClassVar[Mapping[str, float]] = {}

    @abstractmethod
    def wants(self, row: BatchRow) -> bool:
        """Whether the row asks for it."""

    @abstractmethod
    def apply(self, logits: Tensor, rows: Mapping[int, BatchRow]) -> None:
        """Change `logits` [rows, vocabulary], float32 on the host, in place for `rows`, by index.

        Raises SamplingError for an id outside the vocabulary.
        """

    @abstractmethod
    def add_bias(self, bias: DeviceBias, row: BatchRow) -> None:
        """Do the same to a row on the device, but for what the kernels compute themselves."""

    def version(self, row: BatchRow) -> Hashable:
        """Differs between two steps of a request for which `add_bias` does different things.

        Asked of rows that do not want the processor, too.
        """
        return None

    def reads_token_ids(self, sampling: SamplingOptions) -> bool:
        """Whether it needs `known_token_ids`: then the request does not run ahead."""
        return False


def id_array(values: Iterable[int]) -> NDArray[np.int64]:
    """The ids as an array."""
    return np.fromiter(values, np.int64)


def flat_positions(ids: Mapping[int, NDArray[np.int64]], vocab_size: int) -> Tensor:
    """Where the ids of each row lie in the flat logits; SamplingError for one beyond its row.

    Checked on the host first, because a position beyond a row's end would be another row's.
    """
    columns = np.concatenate(list(ids.values()))
    if columns.size and not 0 <= columns.min() <= columns.max() < vocab_size:
        raise SamplingError("a token id is outside the vocabulary")
    row_indices = np.repeat(np.array(list(ids)), [len(each) for each in ids.values()])
    return torch.from_numpy(row_indices * vocab_size + columns)
