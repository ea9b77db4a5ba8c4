"""The CUDA backend: decode rows by our paged kernel, prompts by FlashAttention or cuDNN.

The rows with one token stand first (`device_inputs` orders them so). Nothing reads a slot that was
not written, so blocks need no clearing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nanoinfer_engine.kernels.decode import (
    AttentionShape,
    DecodeWorkspace,
    decode_attention,
)
from nanoinfer_engine.kernels.heads import HeadTransform, rotate_and_write
from nanoinfer_engine.kv_cache import KVCache
from nanoinfer_engine.tuning import time_graph

# cuDNN builds a plan for each new shape: only for large steps of equal, round lengths
_CUDNN_TOKENS, _CUDNN_MULTIPLE = 4096, 128

Heads = tuple[Tensor, Tensor, Tensor]

FALLBACK = AttentionShape(tile=64, num_warps=4, num_stages=3, prefetch=False, num_programs=1024)
_FEW_ROWS = 16
_SHAPES_OF_FEW = tuple(
    AttentionShape(64, 4, 3, prefetch, num_programs)
    for prefetch in (True, False)
    for num_programs in (512, 1024, 2048)
)
_SHAPES_OF_MANY = tuple(
    AttentionShape(*shape, False, num_programs)
    for shape in ((64, 4, 4), (64, 4, 5), (32, 4, 5), (128, 8, 4))
    for num_programs in (512, 1024, 2048, 4096)
)
# contexts that shapes are compared at: the longest that short and long chats share
_TUNED_CONTEXT, _TUNED_LAYERS = 768, 8


@dataclass(frozen=True)
class PromptPlan:
    """The rows with several tokens; all tensors on the device, lengths in tokens."""

    slots: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    query_starts: Tensor  # [rows + 1] int32
    key_starts: Tensor  # [rows + 1] int32
    max_queries: int
    max_keys: int
    context_slots: Tensor | None  # [keys] where any row has a past
    equal_length: int | None  # of all rows, if it is one


@dataclass(frozen=True)
class PagedPlan:
    """A step: `num_decode_rows` rows of one token, then the prompts."""

    num_decode_rows: int
    tables: Tensor  # [decode rows, any] int32
    contexts: Tensor  # [decode rows] int32
    prompts: PromptPlan | None


class PagedAttention:
    """Attention on the device over `cache`, with head transform, for steps of any mix."""

    def __init__(
        self, cache: KVCache, sliding_windows: Sequence[int | None], workspace: DecodeWorkspace
    ) -> None:
        """`sliding_windows` has one entry per layer."""
        self._cache = cache
        self._windows = tuple(sliding_windows)
        self._workspace = workspace
        self._shapes: dict[int, AttentionShape] = {}

    def tune(self, heads: Heads, transform: HeadTransform, pdl_rows: int) -> dict[str, float]:
        """Choose a shape per number of rows; returns µs by candidate.

        `heads` hold as many rows as a step may have. Writes into blocks that nobody may own yet.
        """
        report: dict[str, float] = {}
        chosen: dict[int, AttentionShape] = {}
        most = len(heads[0])
        blocks = -(-_TUNED_CONTEXT // self._cache.block_size)
        tables = torch.arange(most * blocks, device=heads[0].device, dtype=torch.int32)
        tables = (tables % self._cache.num_blocks).view(most, blocks)
        contexts = torch.full((most,), _TUNED_CONTEXT, device=tables.device, dtype=torch.int32)
        contexts.clamp_(max=self._cache.num_blocks * self._cache.block_size)
        for rows in sorted({min(size, most) for size in (1, 8, 32, 64, 128, 256, most)}):
            plan = PagedPlan(rows, tables[:rows], contexts[:rows], None)
            part = (heads[0][:rows], heads[1][:rows], heads[2][:rows])
            timings: dict[AttentionShape, float] = {}
            for shape in _SHAPES_OF_FEW if rows <= _FEW_ROWS else _SHAPES_OF_MANY:
                self._shapes = {rows: shape}
                timings[shape] = self._time(part, transform, plan, pdl=rows <= pdl_rows)
            report |= {f"attention x{rows} {shape}": us for shape, us in timings.items()}
            chosen[rows] = min(timings, key=lambda each: timings[each])
        self._shapes = chosen
        return report

    def _time(self, heads: Heads, transform: HeadTransform, plan: PagedPlan, *, pdl: bool) -> float:
        output = torch.empty(heads[0].shape, dtype=heads[0].dtype, device=heads[0].device)
        layers = range(min(_TUNED_LAYERS, len(self._windows)))

        def run() -> None:
            for layer in layers:
                self.attend(layer, heads, transform, plan, output, pdl=pdl)

        return time_graph(run) / len(layers)

    def _shape(self, num_rows: int) -> AttentionShape:
        """The shape of the next tuned size."""
        sizes = [size for size in self._shapes if size >= num_rows]
        return self._shapes[min(sizes)] if sizes else FALLBACK

    @property
    def supports_graphs(self) -> bool:
        """Yes, for steps of decode rows alone."""
        return True

    def attend(
        self,
        layer: int,
        heads: Heads,
        transform: HeadTransform,
        plan: PagedPlan,
        output: Tensor,
        *,
        pdl: bool = False,
    ) -> Tensor:
        """Transform heads, write K and V, attend; `heads` and `output` as in `decode_attention`.

        Returns `output`, or other memory of the same shape, left as it came, for prompts alone.
        """
        count, window = plan.num_decode_rows, self._windows[layer]
        if count:
            first = (heads[0][:count], heads[1][:count], heads[2][:count])
            decode_attention(
                first,
                self._cache.layer(layer),
                plan.tables,
                plan.contexts,
                transform,
                window,
                self._workspace,
                output[:count],
                self._shape(count),
                pdl=pdl,
            )
        if plan.prompts is not None:
            rest = (heads[0][count:], heads[1][count:], heads[2][count:])
            attended = self._prompts(layer, rest, transform, plan.prompts, output.dtype)
            if not count:
                return attended
            output[count:] = attended
        return output

    def _prompts(
        self,
        layer: int,
        heads: Heads,
        transform: HeadTransform,
        plan: PromptPlan,
        dtype: torch.dtype,
    ) -> Tensor:
        window = self._windows[layer]
        query, key, value = rotate_and_write(
            heads, self._cache.layer(layer), plan.slots, plan.positions, transform, dtype
        )
        if plan.context_slots is not None:
            key, value = self._cache.gather_slots(layer, plan.context_slots)
        elif plan.equal_length is not None and window is None and _suits_cudnn(len(query), plan):
            return _cudnn(query, key, value, plan.equal_length)
        output: Tensor = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            plan.query_starts,
            plan.key_starts,
            plan.max_queries,
            plan.max_keys,
            0.0,
            True,
            False,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )[0]
        return output


def _suits_cudnn(num_tokens: int, plan: PromptPlan) -> bool:
    return num_tokens >= _CUDNN_TOKENS and plan.max_queries % _CUDNN_MULTIPLE == 0


def _cudnn(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Equal whole prompts in one call; [tokens, heads, dim] in and out."""
    query, key, value = (
        part.view(-1, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value)
    )
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)
