"""Attention backends: the protocol they satisfy, what a step tells them, and the registry.

A backend owns both halves of attention over a paged cache: writing this step's K and V into their
slots and reading every earlier one. `reference` defines the truth; each other backend is tested
against it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from nanoinfer_engine.ops.kv_cache import KVCache

PlanT = TypeVar("PlanT")

# name → module:class; imported on first use, because a backend may need a compiler or a device
_BACKENDS = {"reference": "nanoinfer_engine.ops.reference_attention:ReferenceAttention"}


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the rows of a step lie; integer tensors on the CPU except `slots` (model device).

    Row r computes the flat tokens [query_starts[r], query_starts[r + 1]), which are the last ones
    of its context of context_lengths[r] tokens, kept in the blocks block_tables[r] (padded by
    repeating the row's last block).
    """

    query_starts: Tensor  # [rows + 1]
    context_lengths: Tensor  # [rows]
    block_tables: Tensor  # [rows, max blocks]
    slots: Tensor  # [tokens]: where each token's K and V go


class AttentionBackend(Protocol[PlanT]):
    """Attention over the paged cache it was built with."""

    def plan(self, metadata: AttentionMetadata) -> PlanT:
        """Do once per step what all layers share (index tensors, masks)."""

    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, plan: PlanT) -> Tensor:
        """Write K and V, attend; [tokens, heads, head dim] → [tokens, heads, head dim].

        `key` and `value` are [tokens, kv heads, head dim]. Softmax scale is 1/sqrt(head dim).
        """


def make_backend(
    name: str, cache: KVCache, sliding_windows: Sequence[int | None]
) -> AttentionBackend[Any]:
    """The backend `name` over `cache`, windows as in ModelConfig; ValueError if unknown."""
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; known: {', '.join(_BACKENDS)}")
    module, _, attribute = _BACKENDS[name].partition(":")
    backend: AttentionBackend[Any] = getattr(importlib.import_module(module), attribute)(
        cache, sliding_windows
    )
    return backend
