"""How far loading is: what whoever loads reports, and whoever watches reads. Plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadProgress:
    """Bytes of weights in their place, of how many, and the file they come from, from 1 on."""

    num_bytes: int
    total_bytes: int
    shard: int
    num_shards: int


Progress = Callable[[LoadProgress], None]
"""Called before the first tensor and after each."""


def report_nothing(progress: LoadProgress) -> None:
    """The progress callback of a caller that does not watch."""
