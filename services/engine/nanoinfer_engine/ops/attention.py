"""Attention over the paged cache in plain PyTorch: scaled_dot_product_attention of gathered blocks.

Decode rows (one query token) of similar context length are gathered together and attended in one
call, the query heads that share a KV head standing as its query positions: K and V are read once
per group and the number of calls does not grow with the batch. Rows with several query tokens are
attended one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanoinfer_engine.ops.kv_cache import KVCache

# rows whose contexts differ by more than this factor are not padded to one another
MAX_PADDING_FACTOR = 1.5


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


@dataclass(frozen=True)
class DecodeGroup:
    """Decode rows attended in one call, padded to the longest."""

    tokens: Tensor  # [rows] flat token index of each
    blocks: Tensor  # [rows * blocks per row]
    mask: Tensor | None  # [rows, 1, 1, slots] to add to the scores; None: every slot is seen


@dataclass(frozen=True)
class PrefillRow:
    """A row with several query tokens. Without blocks, its whole context is in this step."""

    start: int
    stop: int
    blocks: Tensor | None  # [blocks], with `mask` [queries, slots] to add to the scores
    mask: Tensor | None


@dataclass(frozen=True)
class ReferencePlan:
    """Index tensors of one step, per sliding window in use."""

    slots: Tensor
    groups: dict[int | None, list[DecodeGroup]]
    prefills: dict[int | None, list[PrefillRow]]

    def is_one_group(self, window: int | None) -> bool:
        """Whether one decode group holds every row, in order: nothing to pick out or put back."""
        return not self.prefills[window] and len(self.groups[window]) == 1


class ReferenceAttention:
    """SDPA over gathered blocks; grouped-query heads, sliding windows, any mix of rows."""

    def __init__(self, cache: KVCache, sliding_windows: Sequence[int | None]) -> None:
        """`sliding_windows` has one entry per layer."""
        self._cache = cache
        self._windows = tuple(sliding_windows)

    def plan(self, metadata: AttentionMetadata) -> ReferencePlan:
        """Group the rows and build gather indices and masks, once per distinct window."""
        rows = _Rows(metadata, self._cache)
        windows = set(self._windows)
        return ReferencePlan(
            metadata.slots,
            {window: rows.decode_groups(window) for window in windows},
            {window: rows.prefill_rows(window) for window in windows},
        )

    def forward(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: ReferencePlan,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Write K and V, then attend group by group and row by row.

        `scale` None is 1/sqrt(head dim); `softcap` is as in `AttentionLayer`.
        """
        scores = _Scores(query.shape[-1] ** -0.5 if scale is None else scale, softcap)
        key, value = self._cache.write(layer, plan.slots, key, value)
        window = self._windows[layer]
        groups, prefills = plan.groups[window], plan.prefills[window]
        if plan.is_one_group(window):
            return self._decode(layer, query, groups[0], scores)
        output = torch.empty_like(query)
        for group in groups:
            rows = query.index_select(0, group.tokens)
            output.index_copy_(0, group.tokens, self._decode(layer, rows, group, scores))
        for row in prefills:
            part = slice(row.start, row.stop)
            new = query[part], key[part], value[part]
            output[part] = self._prefill(layer, *new, row, scores)
        return output

    def _decode(self, layer: int, query: Tensor, group: DecodeGroup, scores: _Scores) -> Tensor:
        """[rows, heads, dim] → the same, over the group's gathered blocks."""
        keys, values = self._cache.gather(layer, group.blocks)
        num_rows, heads, dim = query.shape
        kv_heads = keys.shape[2]
        output = scores.attend(
            query.reshape(num_rows, kv_heads, heads // kv_heads, dim),
            keys.view(num_rows, -1, kv_heads, dim).transpose(1, 2),
            values.view(num_rows, -1, kv_heads, dim).transpose(1, 2),
            group.mask,
        )
        return output.reshape(num_rows, heads, dim)

    def _prefill(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row: PrefillRow,
        scores: _Scores,
    ) -> Tensor:
        """[queries, heads, dim] → the same, over the row's own context."""
        if row.blocks is not None:
            keys, values = self._cache.gather(layer, row.blocks)
            key, value = keys.flatten(0, 1), values.flatten(0, 1)
        output = scores.attend(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            row.mask,
            is_causal=row.mask is None,
        )
        return output[0].transpose(0, 1)


@dataclass(frozen=True)
class _Scores:
    """How scores are made of query · key."""

    scale: float
    softcap: float | None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """[rows, heads, queries, dim] over [rows, kv heads, keys, dim]; `mask` is added."""
        if self.softcap is not None:
            return self._capped(query, key, value, mask, is_causal)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=query.shape[1] != key.shape[1],
            scale=self.scale,
        )

    def _capped(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Written out: SDPA knows no soft cap."""
        softcap = self.softcap or 0.0
        group = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
        scores = (query @ key.transpose(-1, -2)).float() * (self.scale / softcap)
        scores = scores.tanh_().mul_(softcap)
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores.masked_fill_(later, -torch.inf)
        elif mask is not None:
            scores += mask
        return scores.softmax(-1).to(value.dtype) @ value


class _Rows:
    """One step's rows as NumPy arrays, sorted out into groups and masks."""

    def __init__(self, metadata: AttentionMetadata, cache: KVCache) -> None:
        self._cache = cache
        self._starts = metadata.query_starts.numpy()
        self._contexts = metadata.context_lengths.numpy()
        self._tables = metadata.block_tables.numpy()
        self._lengths = np.diff(self._starts)

    def decode_groups(self, window: int | None) -> list[DecodeGroup]:
        """Rows of one query token, grouped so that padding stays bounded."""
        rows = np.flatnonzero(self._lengths == 1)
        if not rows.size:
            return []
        first, last = self._visible_blocks(self._contexts[rows], 1, window)
        counts = last - first + 1
        if counts.max() <= MAX_PADDING_FACTOR * counts.min():
            return [self._group(rows, first, last, window)]
        order = np.argsort(counts, kind="stable")
        groups, begin = [], 0
        for end in range(1, len(order) + 1):
            if end == len(order) or (
                counts[order[end]] > MAX_PADDING_FACTOR * counts[order[begin]]
            ):
                members = order[begin:end]
                groups.append(self._group(rows[members], first[members], last[members], window))
                begin = end
        return groups

    def prefill_rows(self, window: int | None) -> list[PrefillRow]:
        """Rows of several query tokens."""
        return [self._prefill_row(int(row), window) for row in np.flatnonzero(self._lengths > 1)]

    def _visible_blocks(
        self, contexts: NDArray[np.int64], num_queries: int, window: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last block index that the last `num_queries` tokens of each context see."""
        size = self._cache.block_size
        seen_from = np.zeros_like(contexts)
        if window is not None:
            seen_from = np.maximum(contexts - num_queries + 1 - window, 0)
        return seen_from // size, (contexts - 1) // size

    def _group(
        self,
        rows: NDArray[np.int64],
        first: NDArray[np.int64],
        last: NDArray[np.int64],
        window: int | None,
    ) -> DecodeGroup:
        size = self._cache.block_size
        columns = first[:, None] + np.arange((last - first).max() + 1)
        # a shorter row repeats its own last block: it must not read another request's memory
        blocks = self._tables[rows[:, None], np.minimum(columns, last[:, None])]
        positions = (columns[:, :, None] * size + np.arange(size)).reshape(len(rows), -1)
        queries = self._contexts[rows, None] - 1
        mask = self._mask(queries, positions, window)
        return DecodeGroup(
            self._tensor(self._starts[rows]),
            self._tensor(blocks.reshape(-1)),
            None if mask is None else mask[:, None, None, :],
        )

    def _prefill_row(self, row: int, window: int | None) -> PrefillRow:
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        context = int(self._contexts[row])
        if stop - start == context and (window is None or window >= context):
            return PrefillRow(start, stop, None, None)
        first, last = self._visible_blocks(self._contexts[row : row + 1], stop - start, window)
        size = self._cache.block_size
        positions = np.arange(first[0] * size, (last[0] + 1) * size)
        queries = np.arange(context - (stop - start), context)[:, None]
        blocks = self._tensor(self._tables[row, first[0] : last[0] + 1])
        return PrefillRow(start, stop, blocks, self._mask(queries, positions, window))

    def _mask(
        self, queries: NDArray[np.int64], keys: NDArray[np.int64], window: int | None
    ) -> Tensor | None:
        """Scores to add, 0 or -inf, where positions `queries` may see `keys` (broadcast)."""
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        if seen.all():
            return None
        mask = np.where(seen, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(mask).to(self._cache.device, self._cache.dtype)

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._cache.device)
