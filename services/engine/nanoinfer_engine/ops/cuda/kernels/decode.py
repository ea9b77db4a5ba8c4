"""Decode attention over the paged cache: one new token per row, shapes and workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoinfer_engine.ops.cuda.kernels.attention import decode_kernel
from nanoinfer_engine.ops.cuda.kernels.heads import HeadTransform
from nanoinfer_engine.ops.cuda.kernels.launch import pdl_options, power_of_two

MAX_PROGRAMS = 4096
MAX_SPLITS = 32


@dataclass(frozen=True)
class AttentionShape:
    """Tile of positions, warps and stages of a program, and how many programs share a step.

    With `prefetch` a program loads its first tile before it waits for its predecessor: good for few
    rows, but the registers it takes cost bandwidth where there are many.
    """

    tile: int
    num_warps: int
    num_stages: int
    prefetch: bool
    num_programs: int


class DecodeWorkspace:
    """Memory in which the programs of one row meet; reused by every layer of a step."""

    def __init__(
        self, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        """Room for `max_rows` rows at any split."""
        most = max(max_rows, MAX_PROGRAMS // num_kv_heads, MAX_SPLITS) * num_heads
        self.parts = torch.empty((most, head_dim), dtype=torch.float32, device=device)
        self.maxima = torch.empty(most, dtype=torch.float32, device=device)
        self.sums = torch.empty(most, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)


def num_splits(num_rows: int, num_kv_heads: int, num_programs: int) -> int:
    """Programs that a row's context is split over."""
    return max(min(num_programs // (num_rows * num_kv_heads), MAX_SPLITS), 1)


def decode_attention(
    heads: tuple[Tensor, Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    tables: Tensor,
    contexts: Tensor,
    transform: HeadTransform,
    window: int | None,
    workspace: DecodeWorkspace,
    output: Tensor,
    shape: AttentionShape,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    pdl: bool = False,
) -> Tensor:
    """One new token per row attends to its context and joins the cache; returns `output`.

    `heads` are query [rows, heads, dim], key and value [rows, kv heads, dim], all with the same
    row stride; `cache` keys and values [blocks, block size, kv heads, dim]; `tables` [rows, any];
    `contexts` [rows] with the new token counted, 0 for a row that is padding (left unwritten);
    `output` [rows, heads, dim], contiguous, in the dtype that is computed with; the cache may be
    e4m3. `scale` None is 1/sqrt(dim); `softcap` is as in `AttentionLayer`.
    """
    query, key, value = heads
    num_rows, num_heads, dim = query.shape
    _, block_size, kv_heads, _ = cache[0].shape
    group, splits = num_heads // kv_heads, num_splits(num_rows, kv_heads, shape.num_programs)
    unused = query  # a pointer that the kernel never follows
    decode_kernel[(num_rows, kv_heads, splits)](
        query, key, value, query.stride(0), *cache, cache[0].stride(1), tables, tables.stride(0),
        contexts,
        unused if transform.rotary is None else transform.rotary,
        unused if transform.query_gain is None else transform.query_gain,
        unused if transform.key_gain is None else transform.key_gain,
        output, workspace.parts, workspace.maxima, workspace.sums, workspace.arrived,
        transform.eps, dim**-0.5 if scale is None else scale, splits,
        WINDOW=window or 0, KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(power_of_two(group), 16),
        DIM=dim, DIM_PAD=power_of_two(dim), BLOCK_SIZE=block_size,
        TILE=shape.tile if dim <= 128 else min(shape.tile, 32), SPLIT=splits > 1, MOST=MAX_SPLITS,
        NORM=transform.query_gain is not None, ROTARY=transform.rotary is not None,
        SOFTCAP=softcap or 0.0, PREFETCH=shape.prefetch,
        num_warps=shape.num_warps, num_stages=shape.num_stages, **pdl_options(pdl),
    )  # fmt: skip
    return output
