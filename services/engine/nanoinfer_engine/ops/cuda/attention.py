"""The CUDA backend: decode rows and prompts by our paged kernels, whole equal prompts by cuDNN.

The rows with one token stand first (`device_inputs` orders them so). Nothing reads a slot that was
not written, so blocks need no clearing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nanoinfer_engine.ops.cuda.kernels.decode import (
    AttentionShape,
    DecodeWorkspace,
    decode_attention,
)
from nanoinfer_engine.ops.cuda.kernels.heads import HeadTransform, rotate_and_write
from nanoinfer_engine.ops.cuda.kernels.prompts import PromptShape, prompt_attention
from nanoinfer_engine.ops.kv_cache import KVCache

# cuDNN plans each new shape for 40 to 800 ms: only for large steps of equal, round lengths
_CUDNN_TOKENS, _CUDNN_MULTIPLE = 4096, 1024

# measured on one H200 at 256 to 8192 tokens; wider heads would not leave enough registers
_PROMPT_SHAPE, _WIDE_PROMPT_SHAPE = PromptShape(64, 4, 2), PromptShape(32, 8, 2)

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PromptPlan:
    """The rows with several tokens; all tensors int32 on the device."""

    slots: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    query_starts: Tensor  # [rows + 1]
    contexts: Tensor  # [rows], new tokens counted
    tables: Tensor  # [rows, any]
    tiles: Tensor  # [tiles, 2], as `query_tiles` gives them
    equal_length: int | None  # of all rows, if it is one and none has a past


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
        self,
        cache: KVCache,
        sliding_windows: Sequence[int | None],
        workspace: DecodeWorkspace,
        shape_of: Callable[[int], AttentionShape],
    ) -> None:
        """`sliding_windows` has one entry per layer; `shape_of` chooses by number of rows."""
        self._cache = cache
        self._windows = tuple(sliding_windows)
        self._workspace = workspace
        self._shape_of = shape_of
        self._shapes: dict[int, AttentionShape] = {}

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self._cache.device

    def _shape(self, num_rows: int) -> AttentionShape:
        if num_rows not in self._shapes:
            self._shapes[num_rows] = self._shape_of(num_rows)
        return self._shapes[num_rows]

    def attend(
        self,
        layer: int,
        heads: Heads,
        transform: HeadTransform,
        plan: PagedPlan,
        output: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        pdl: bool = False,
    ) -> Tensor:
        """Transform heads, write K and V, attend; `heads` and `output` as in `decode_attention`.

        Returns `output`, or what cuDNN has made where that is all.
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
                scale=scale,
                softcap=softcap,
                pdl=pdl,
            )
        if plan.prompts is not None:
            rest = (heads[0][count:], heads[1][count:], heads[2][count:])
            rest_of_output = output[count:]
            attended = self._prompts(
                layer, rest, transform, plan.prompts, rest_of_output, scale, softcap
            )
            if not count:
                return attended
            if attended is not rest_of_output:
                rest_of_output.copy_(attended)
        return output

    def _prompts(
        self,
        layer: int,
        heads: Heads,
        transform: HeadTransform,
        plan: PromptPlan,
        output: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """What `output` is for, there or in a tensor of its own."""
        window = self._windows[layer]
        whole = plan.equal_length is not None and window is None and softcap is None
        whole = whole and _suits_cudnn(plan)
        cache = self._cache.layer(layer)
        query, key, value = rotate_and_write(
            heads, cache, plan.slots, plan.positions, transform, output.dtype, copies=whole
        )
        if whole:
            return _cudnn(query, key, value, plan.equal_length or 0, scale)
        return prompt_attention(
            query,
            cache,
            plan.tables,
            plan.tiles,
            plan.query_starts,
            plan.contexts,
            window,
            output,
            _PROMPT_SHAPE if query.shape[-1] <= 128 else _WIDE_PROMPT_SHAPE,
            scale=scale,
            softcap=softcap,
        )


def _suits_cudnn(plan: PromptPlan) -> bool:
    length = plan.equal_length or 0
    return length % _CUDNN_MULTIPLE == 0 and len(plan.slots) >= _CUDNN_TOKENS


def _cudnn(query: Tensor, key: Tensor, value: Tensor, length: int, scale: float | None) -> Tensor:
    """Equal whole prompts in one call; [tokens, heads, dim] in and out."""
    query, key, value = (
        part.view(-1, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value)
    )
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, scale=scale
        )
    return output.transpose(1, 2).flatten(0, 1)
