"""Prompt attention over the paged cache against plain PyTorch in float32."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.interpreted import choose_here

prompts = pytest.importorskip("nanoinfer_engine.ops.cuda.kernels.prompts")

pytestmark = pytest.mark.gpu

CASES = [  # new tokens and contexts of the rows
    ([5, 130, 1, 200], [5, 130, 70, 333]),
    ([129, 40], [129, 140]),
    ([1, 128, 256], [513, 128, 300]),
]
SHAPES = choose_here(  # heads, kv heads, head dim, block size
    [(8, 2, 128, 16), (3, 3, 96, 8), (6, 1, 64, 32), (16, 1, 256, 16)], [(4, 2, 96, 16)]
)


def expected(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """The last len(query) positions of a context attend; all [tokens, heads, dim] float32."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, 1).transpose(0, 1) for part in (key, value))
    own = torch.arange(key.shape[1] - len(query), key.shape[1], device=query.device)[:, None]
    all_ = torch.arange(key.shape[1], device=query.device)[None]
    seen = all_ <= own
    if window:
        seen &= all_ > own - window
    return torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key, value, attn_mask=seen
    ).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 50, 150])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_row_attends_to_its_own_blocks(
    shape: tuple[int, int, int, int],
    case: tuple[list[int], list[int]],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16 matrices")
    heads, kv_heads, dim, size = shape
    lengths, contexts = case
    generator = torch.Generator().manual_seed(sum(contexts) + dim)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    width = -(-max(contexts) // size)
    tables = torch.randperm(len(lengths) * width, generator=generator)
    tables = tables.view(len(lengths), width).to(device, torch.int32)
    # NaN wherever nothing was written
    cache_shape = (len(lengths) * width, size, kv_heads, dim)
    cache = [torch.full(cache_shape, float("nan")).to(device, dtype) for _ in range(2)]
    history = []
    for row, context in enumerate(contexts):
        pair = normal(context, kv_heads, dim), normal(context, kv_heads, dim)
        history.append(pair)
        places = torch.arange(context, device=device)
        blocks = tables[row].long()[places // size]
        for cached, values in zip(cache, pair, strict=True):
            cached[blocks, places % size] = values
    query = normal(sum(lengths), heads, dim)
    starts = np.cumsum([0, *lengths])
    tiles = prompts.query_tiles(np.array(lengths), np.array(contexts))
    output = torch.full_like(query, float("nan"))
    prompts.prompt_attention(
        query,
        tuple(cache),
        tables,
        torch.from_numpy(tiles).to(device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        window,
        output,
        prompts.PromptShape(32 if dim > 128 else 64, 8, 2),
    )
    for row, (first, last) in enumerate(pairwise(starts)):
        key, value = (part.float() for part in history[row])
        wanted = expected(query[first:last].float(), key, value, window)
        error = (output[first:last].float() - wanted).norm() / wanted.norm()
        assert float(error) < (2e-3 if dtype == torch.float16 else 1.5e-2), (row, float(error))


def test_tiles_cover_every_new_token_once() -> None:
    lengths, contexts = np.array([1, 300, 128, 129]), np.array([900, 300, 128, 400])
    tiles = prompts.query_tiles(lengths, contexts)
    seen = {(int(row), int(first)) for row, first in tiles}
    assert seen == {(0, 0), (1, 0), (1, 128), (1, 256), (2, 0), (3, 0), (3, 128)}
    assert len(tiles) == len(seen)
    past = contexts - lengths
    reach = [int(past[row] + first) for row, first in tiles]
    assert reach == sorted(reach, reverse=True)
