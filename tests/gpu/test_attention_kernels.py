"""Decode attention and the prefill rotation against plain PyTorch in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.interpreted import choose_here

decode = pytest.importorskip("nanoinfer_engine.ops.cuda.kernels.decode")
heads = pytest.importorskip("nanoinfer_engine.ops.cuda.kernels.heads")

pytestmark = pytest.mark.gpu

SHAPES = choose_here(  # heads, kv heads, head dim, block size
    [(16, 8, 128, 16), (32, 8, 128, 16), (6, 2, 64, 8), (3, 3, 96, 32), (16, 1, 256, 16)],
    [(2, 1, 128, 16), (6, 2, 64, 8), (3, 3, 96, 32), (16, 1, 256, 16)],
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


def rotary_table(positions: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)
    return table.unsqueeze(2).to(dtype)


def transformed(
    heads: Tensor, gain: Tensor | None, rotary: Tensor | None, positions: Tensor, eps: float
) -> Tensor:
    x = heads.float()
    if gain is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()
    if rotary is not None:
        cos, sin = rotary[positions].float().unbind(1)
        x = x * cos + x.roll(x.shape[-1] // 2, -1) * sin
    return x


class Case:
    """Random rows over shuffled blocks of a cache that is NaN wherever nothing was written."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        contexts: list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.heads, self.kv_heads, self.dim, size = shape
        generator = torch.Generator().manual_seed(sum(contexts) + self.dim)
        self.contexts = torch.tensor(contexts, dtype=torch.int32, device=device)
        width = -(-max(contexts) // size)
        blocks = torch.randperm(len(contexts) * width, generator=generator)
        self.tables = blocks.view(len(contexts), width).to(device, torch.int32)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        total = self.heads + 2 * self.kv_heads
        self.qkv = normal(len(contexts), total, self.dim)
        cache_shape = (len(contexts) * width, size, self.kv_heads, self.dim)
        self.cache = [torch.full(cache_shape, float("nan")).to(device, dtype) for _ in range(2)]
        self.history = []
        for row, context in enumerate(contexts):
            past = max(context - 1, 0)
            pair = normal(past, self.kv_heads, self.dim), normal(past, self.kv_heads, self.dim)
            self.history.append(pair)
            for cached, values in zip(self.cache, pair, strict=True):
                for position in range(past):
                    block = int(self.tables[row, position // size])
                    cached[block, position % size] = values[position]
        self.gains = [normal(self.dim) for _ in range(2)]
        self.rotary = rotary_table(max(contexts) + 1, self.dim, device, dtype)
        self.size = size

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        h, k = self.heads, self.kv_heads
        return self.qkv[:, :h], self.qkv[:, h : h + k], self.qkv[:, h + k :]

    def expected(self, row: int, norm: bool, rotate: bool, window: int | None) -> Tensor:
        position = self.contexts[row : row + 1].long() - 1
        q, k, v = (part[row : row + 1] for part in self.parts)
        gains = self.gains if norm else [None, None]
        rotary = self.rotary if rotate else None
        q = transformed(q, gains[0], rotary, position, 1e-6)[0]
        k = transformed(k, gains[1], rotary, position, 1e-6)
        keys = torch.cat([self.history[row][0].float(), k])
        values = torch.cat([self.history[row][1].float(), v.float()])
        if window is not None:
            keys, values = keys[-window:], values[-window:]
        group = self.heads // self.kv_heads
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
        scores = torch.einsum("hd,nhd->hn", q, keys) * self.dim**-0.5
        return torch.einsum("hn,nhd->hd", scores.softmax(-1), values)


FEW = decode.AttentionShape(64, 4, 3, True, choose_here(1024, 32))
MANY = decode.AttentionShape(32, 4, 5, False, choose_here(256, 8))


def run(
    case: Case,
    norm: bool,
    rotate: bool,
    window: int | None,
    shape: decode.AttentionShape = FEW,
    pdl: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    device = case.qkv.device
    transform = heads.HeadTransform(
        case.rotary if rotate else None,
        case.gains[0] if norm else None,
        case.gains[1] if norm else None,
        1e-6,
    )
    rows = len(case.contexts)
    workspace = decode.DecodeWorkspace(rows, case.heads, case.kv_heads, case.dim, device)
    output = torch.full((rows, case.heads, case.dim), float("nan")).to(
        device, dtype or case.qkv.dtype
    )
    for _ in range(2):  # the second run finds what the first left in the workspace
        decode.decode_attention(
            case.parts,
            tuple(case.cache),
            case.tables,
            case.contexts,
            transform,
            window,
            workspace,
            output,
            shape,
            pdl=pdl,
        )
    return output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [FEW, MANY])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(
    shape: tuple[int, int, int, int],
    kernel: decode.AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16 matrices")
    contexts = [1, 2, 17, 64, 65, 66, 300] if device.type == "cuda" else [1, 17, 66, 140]
    if device.type == "cuda":
        contexts += [1500]
    case = Case(shape, contexts, dtype, device)
    output = run(case, norm=True, rotate=True, window=None, shape=kernel)
    bound = 3e-3 if dtype == torch.float16 else 2e-2
    for row in range(len(contexts)):
        assert relative_error(output[row], case.expected(row, True, True, None)) < bound, row


def test_one_row_is_split_and_added_up(device: torch.device) -> None:
    contexts = [3000] if device.type == "cuda" else [400]
    case = Case(SHAPES[0], contexts, torch.float16, device)
    output = run(case, norm=True, rotate=True, window=None)
    assert relative_error(output[0], case.expected(0, True, True, None)) < 3e-3
    assert int(case.contexts[0]) == contexts[0]


@pytest.mark.parametrize("window", [1, 40, 100])
def test_sliding_window_without_transform(window: int, device: torch.device) -> None:
    case = Case((6, 2, 64, 8), [1, 39, 40, 41, 150], torch.float16, device)
    output = run(case, norm=False, rotate=False, window=window)
    for row in range(5):
        assert relative_error(output[row], case.expected(row, False, False, window)) < 3e-3, row


def test_new_keys_and_values_are_written_and_padding_writes_nothing(device: torch.device) -> None:
    case = Case((6, 2, 64, 8), [20, 9], torch.float16, device)
    case.contexts[1] = 0
    before = [cached.clone() for cached in case.cache]
    output = run(case, norm=True, rotate=True, window=None)
    assert torch.isnan(output[1]).all()
    block, offset = int(case.tables[0, 2]), 3
    key = transformed(
        case.parts[1][:1], case.gains[1], case.rotary, torch.tensor([19], device=device), 1e-6
    )[0]
    assert relative_error(case.cache[0][block, offset], key) < 2e-3
    assert torch.equal(case.cache[1][block, offset], case.parts[2][0])
    for cached, old in zip(case.cache, before, strict=True):
        old[block, offset] = cached[block, offset]
        assert torch.equal(cached.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_rotate_and_write(shape: tuple[int, int, int, int], device: torch.device) -> None:
    case = Case(shape, [5, 6, 7], torch.float16, device)
    positions = torch.tensor([4, 0, 6], device=device)
    slots = torch.tensor([3, 0, 9], device=device)
    transform = heads.HeadTransform(case.rotary, *case.gains, 1e-6)
    query, key, value = heads.rotate_and_write(
        case.parts, tuple(case.cache), slots, positions, transform, torch.float16
    )
    expected = [
        transformed(part, gain, case.rotary, positions, 1e-6)
        for part, gain in zip(case.parts, case.gains, strict=False)
    ]
    assert relative_error(query, expected[0]) < 2e-3
    assert relative_error(key, expected[1]) < 2e-3
    assert torch.equal(value, case.parts[2])
    flat = [cached.view(-1, case.kv_heads, case.dim) for cached in case.cache]
    assert torch.equal(flat[0][slots], key)
    assert torch.equal(flat[1][slots], case.parts[2])
