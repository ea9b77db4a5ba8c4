"""How checkpoint tensors map onto parameters: the vocabulary in which each model states its names.

A fused parameter (query, key and value; gate and up) is the concatenation of its parts' rows, in
the order in which the model lists them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleSource:
    """One module of the checkpoint and the module of ours that holds its weight and bias.

    `rows` is how many rows of ours it fills, None for all. `transposed` weights are stored
    [in, out].
    """

    theirs: str
    ours: str
    rows: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class CheckpointLayout:
    """A model's sources, the prefix its names may carry, and the names that hold no weights."""

    sources: tuple[ModuleSource, ...]
    prefix: str
    ignored: re.Pattern[str]
    tied: tuple[str, str] | None = None
    """(name, parameter): a tensor that may be stored again and must then equal the parameter."""
