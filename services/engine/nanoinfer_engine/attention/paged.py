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

from nanoinfer_engine.kernels.attention import (
    DecodeWorkspace,
    HeadTransform,
    decode_attention,
    rotate_and_write,
)
from nanoinfer_engine.kv_cache import KVCache

# cuDNN builds a plan for each new shape: only for large steps of equal, round lengths
_CUDNN_TOKENS, _CUDNN_MULTIPLE = 4096, 128

Heads = tuple[Tensor, Tensor, Tensor]


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

    @property
    def supports_graphs(self) -> bool:
        """Yes, for steps of decode rows alone."""
        return True

    def attend(
        self, layer: int, heads: Heads, transform: HeadTransform, plan: PagedPlan, output: Tensor,
        *, pdl: bool = False,
    ) -> None:
        """Transform heads, write K and V, attend; `heads` as in `decode_attention`."""
        count, window = plan.num_decode_rows, self._windows[layer]
        if count:
            first = (heads[0][:count], heads[1][:count], heads[2][:count])
            decode_attention(first, self._cache.layer(layer), plan.tables, plan.contexts,
                             transform, window, self._workspace, output[:count], pdl=pdl)
        if plan.prompts is not None:
            rest = (heads[0][count:], heads[1][count:], heads[2][count:])
            output[count:] = self._prompts(layer, rest, transform, plan.prompts, window)

    def _prompts(self, layer: int, heads: Heads, transform: HeadTransform, plan: PromptPlan,
                 window: int | None) -> Tensor:
        cache = self._cache.layer(layer)
        query, key = rotate_and_write(heads, cache, plan.slots, plan.positions, transform)
        value = heads[2]
        if plan.context_slots is not None:
            key, value = (
                cached.flatten(0, 1).index_select(0, plan.context_slots) for cached in cache
            )
        elif plan.equal_length is not None and window is None and _suits_cudnn(len(query), plan):
            return _cudnn(query, key, value, plan.equal_length)
        output: Tensor = torch.ops.aten._flash_attention_forward(
            query, key, value, plan.query_starts, plan.key_starts, plan.max_queries, plan.max_keys,
            0.0, True, False,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )[0]
        return output


def _suits_cudnn(num_tokens: int, plan: PromptPlan) -> bool:
    return num_tokens >= _CUDNN_TOKENS and plan.max_queries % _CUDNN_MULTIPLE == 0


def _cudnn(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Equal whole prompts in one call; [tokens, heads, dim] in and out."""
    rows = [part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value)]
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        output = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)
