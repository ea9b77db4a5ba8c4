"""Kernels over 8-bit weights, activations and caches against plain PyTorch in float32.

The interpreter of Triton 3.6 rounds to e4m3 wrongly (no carry out of the mantissa): what stores in
8 bits is tested on a card alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.ops.kv_cache import FP8, KVCache
from nanoinfer_engine.ops.linear import Fp8Linear
from nanoinfer_engine.ops.linear.fp8 import quantize_rows
from nanoinfer_engine.ops.modules import Activation, Norm
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from torch import Tensor

pytest.importorskip("triton")

from nanoinfer_engine.ops.cuda.kernels import heads, linear, norms, quantize

from tests.gpu.test_attention_kernels import FEW, MANY, SHAPES, Case, run, transformed
from tests.gpu.test_row_kernels import BOUND, DTYPES, OUTPUTS, normal, relative_error, rms_norm

GUIDE = Path(__file__).resolve().parents[2] / "models" / "guide"

pytestmark = pytest.mark.gpu
stores_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device: Triton's interpreter rounds to e4m3 wrongly",
)


def quantized(
    outputs: int, columns: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """An e4m3 weight whose outputs differ in size, its scales, and what both stand for."""
    sizes = torch.logspace(-2, 2, outputs, device=device)[:, None]
    weight = normal(outputs, columns, device=device, dtype=torch.float32) * columns**-0.5 * sizes
    values, scales = quantize_rows(weight.to(dtype))
    return values, scales[:, 0].contiguous(), values.float() * scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [384, 1024, 3072])
@pytest.mark.parametrize("block", [(1, 1024, 1), (2, 512, 2), (4, 256, 4)])
def test_gemv(
    block: tuple[int, int, int], columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    shape = linear.GemvShape(*block)
    weight, scale, exact = quantized(OUTPUTS, columns, device, dtype)
    x, gain = (normal(*s, device=device, dtype=dtype, seed=9) for s in ((1, columns), (columns,)))
    sizes = ((OUTPUTS,), (1, OUTPUTS))
    bias, held = (normal(*s, device=device, dtype=dtype, seed=4) for s in sizes)
    plain, normed = x.float() @ exact.T, rms_norm(x, gain, 1e-6) @ exact.T
    output = torch.full((1, OUTPUTS), float("nan")).to(device, dtype)
    linear.gemv(x, weight, output, shape, scale=scale, bias=bias)
    assert relative_error(output, plain + bias.float()) < BOUND[dtype]
    output.copy_(held)
    linear.gemv(x, weight, output, shape, scale=scale, residual=True)
    assert relative_error(output, held.float() + plain) < BOUND[dtype]
    half = OUTPUTS // 2
    gated = torch.full((1, half), float("nan")).to(device, dtype)
    linear.gemv(x, weight, gated, shape, scale=scale, gain=gain, eps=1e-6, gated=True)
    expected = torch.nn.functional.silu(normed[:, :half]) * normed[:, half:]
    assert relative_error(gated, expected) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 17, 64])
@pytest.mark.parametrize(
    "tile", [(16, 256, 4, 2, 3), (64, 128, 1, 4, 3), (32, 512, 2, 4, 3), (128, 128, 1, 4, 4)]
)
def test_few_rows(
    tile: tuple[int, int, int, int, int], rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16 matrices")
    shape = linear.TileShape(*tile)
    weight, scale, exact = quantized(208, 1024, device, dtype)
    x = normal(rows, 1024, device=device, dtype=dtype, seed=3)
    parts = torch.full((shape.splits, rows, 208), float("nan"), device=device)
    linear.few_rows(x, weight, parts, shape, scale=scale)
    assert relative_error(parts.sum(0), x.float() @ exact.T) < BOUND[dtype]
    if shape.splits > 1:
        return
    bias = normal(208, device=device, dtype=dtype)
    output = torch.full((1, rows, 104), float("nan")).to(device, dtype)
    linear.few_rows(x, weight, output, shape, scale=scale, bias=bias, gated=True)
    gate, up = (x.float() @ exact.T + bias.float()).chunk(2, -1)
    assert relative_error(output[0], torch.nn.functional.silu(gate) * up) < BOUND[dtype]


@stores_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 1024, 14336])
def test_quantize_rows(width: int, dtype: torch.dtype, device: torch.device) -> None:
    x = normal(6, width, device=device, dtype=dtype)
    x[1] *= 1e-3
    x[2] = 0
    x[3, 5] = float("nan")
    x[4, width - 1] = float("-inf")
    values, scales = quantize.quantize_rows(x)
    expected, expected_scales = quantize_rows(x)
    finite = [0, 1, 2, 5]
    assert values.dtype == FP8
    assert torch.allclose(scales[finite], expected_scales[finite], rtol=1e-6)
    # a last bit of the scale may move a value over a border between two codes, not further
    difference = (values.float() - expected.float())[finite].abs()
    assert (difference <= expected.float()[finite].abs() / 8 + 2**-9).all()
    assert (difference > 0).float().mean() < 1e-2
    assert not values.float()[2].any()
    products = (values.float() * scales).sum(-1)
    assert products.isnan().tolist() == [False, False, False, True, True, False]


@stores_fp8
@pytest.mark.parametrize("width", [1024, 3072])
def test_quantize_gated_rows(width: int, device: torch.device) -> None:
    x = normal(3, 2 * width, device=device, dtype=torch.float16)
    values, scales = quantize.quantize_rows(x, "silu")
    gate, up = x.float().chunk(2, -1)
    assert relative_error(values.float() * scales, torch.nn.functional.silu(gate) * up) < 4e-2


@stores_fp8
@pytest.mark.parametrize("width", [384, 1024, 4096])
def test_add_norm_in_8_bits(width: int, device: torch.device) -> None:
    residual, gain = (
        normal(*s, device=device, dtype=torch.float16) for s in ((5, width), (width,))
    )
    parts = normal(1, 5, width, device=device, dtype=torch.bfloat16)
    parts[0, 4, 7] = float("inf")
    total = (residual.float() + parts[0].float()).half()
    values = torch.empty_like(residual, dtype=FP8)
    scales = torch.full((5, 1), float("nan"), device=device)
    norms.add_norm(residual, parts, gain, 1e-5, values, scales=scales)
    assert torch.equal(residual, total)
    expected_values, expected_scales = quantize_rows(rms_norm(total, gain, 1e-5))
    assert torch.allclose(scales[:4], expected_scales[:4], rtol=1e-5)
    restored, expected = values.float() * scales, expected_values.float() * expected_scales
    assert relative_error(restored[:4], expected[:4]) < 1e-2
    assert restored[4].isnan().any()


def fp8_case(shape: tuple[int, int, int, int], contexts: list[int], device: torch.device) -> Case:
    """A case whose cache is in e4m3, and whose history is what that holds."""
    case = Case(shape, contexts, torch.float16, device)
    case.cache = [cached.to(FP8) for cached in case.cache]
    case.history = [(keys.to(FP8), values.to(FP8)) for keys, values in case.history]
    return case


def rounded(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(FP8).float()


def expected(case: Case, row: int) -> Tensor:
    position = case.contexts[row : row + 1].long() - 1
    q, k, v = (part[row : row + 1] for part in case.parts)
    q = transformed(q, case.gains[0], case.rotary, position, 1e-6)[0]
    k = transformed(k, case.gains[1], case.rotary, position, 1e-6)
    keys = torch.cat([case.history[row][0].float(), rounded(k)])
    values = torch.cat([case.history[row][1].float(), rounded(v)])
    group = case.heads // case.kv_heads
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = torch.einsum("hd,nhd->hn", q, keys) * case.dim**-0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), values)


@stores_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [FEW, MANY])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(
    shape: tuple[int, int, int, int], kernel: object, dtype: torch.dtype, device: torch.device
) -> None:
    """Queries and new keys come in `dtype`, as a product gives them; float16 is computed with."""
    contexts = [1, 2, 17, 64, 65, 66, 300, 1500] if device.type == "cuda" else [1, 17, 66, 140]
    case = fp8_case(shape, contexts, device)
    case.qkv = case.qkv.to(dtype)
    output = run(case, norm=True, rotate=True, window=None, shape=kernel, dtype=torch.float16)
    for row in range(len(contexts)):
        # one code of the new key may be the next one
        assert relative_error(output[row], expected(case, row)) < 1e-2, row


@stores_fp8
def test_a_new_value_saturates_and_attends_as_it_is_stored(device: torch.device) -> None:
    case = fp8_case((6, 2, 64, 8), [1, 9], device)
    case.qkv[:, 8:] *= 1000
    case.qkv[1, 8, 3] = float("nan")
    output = run(case, norm=True, rotate=True, window=None, dtype=torch.float16)
    stored = case.cache[1][int(case.tables[0, 0]), 0].float()
    assert torch.equal(stored, rounded(case.parts[2][0]))
    assert stored.abs().max() == 448
    assert torch.equal(output[0].float(), stored.repeat_interleave(3, 0))
    nan = case.cache[1][int(case.tables[1, 1]), 0, 0].float().isnan()
    assert nan.nonzero().flatten().tolist() == [3]


@stores_fp8
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_and_write(dtype: torch.dtype, device: torch.device) -> None:
    case = fp8_case((6, 2, 64, 8), [5, 6, 7], device)
    case.qkv = case.qkv.to(dtype)
    case.qkv[0, 8:] *= 1000
    positions = torch.tensor([4, 0, 6], device=device)
    slots = torch.tensor([3, 0, 9], device=device)
    transform = heads.HeadTransform(case.rotary, *case.gains, 1e-6)
    query, key, value = heads.rotate_and_write(
        case.parts, tuple(case.cache), slots, positions, transform, torch.float16
    )
    assert {query.dtype, key.dtype, value.dtype} == {torch.float16}
    q, k = (
        transformed(part, gain, case.rotary, positions, 1e-6)
        for part, gain in zip(case.parts[:2], case.gains, strict=True)
    )
    assert relative_error(query, q) < 2e-3
    assert relative_error(key, rounded(k)) < 1e-2
    assert torch.equal(value.float(), rounded(case.parts[2]))
    flat = [cached.view(torch.uint8).view(-1, 2, 64) for cached in case.cache]
    assert torch.equal(flat[0][slots].view(FP8).float(), key.float())
    assert torch.equal(flat[1][slots].view(FP8).float(), value.float())


@stores_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64, 500])
def test_products_of_many_rows(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    source = torch.nn.Linear(1024, 416, bias=True, device=device, dtype=dtype).requires_grad_(False)
    with device:
        module = Fp8Linear(1024, 416, dtype, bias=True)
    module.load_rows(0, source.weight, lambda stored, target: target.copy_(stored))
    module.bias.copy_(source.bias)  # type: ignore[union-attr]
    x = normal(rows, 1024, device=device, dtype=dtype, seed=1)
    exact = x.float() @ source.weight.float().T + source.bias.float()
    values, scales = quantize_rows(x)
    same = (values.float() * scales) @ (module.weight.float() * module.scale[:, None]).T
    same += source.bias.float()
    plain = module(x)
    assert plain.dtype == dtype
    assert relative_error(plain, same) < 1e-2
    assert relative_error(plain, exact) < 5e-2


@stores_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64, 500])
def test_a_gated_mlp_in_8_bits(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    from nanoinfer_engine.ops.cuda.backend import Stream

    from tests.gpu.test_cuda_ops import cuda_ops

    config = replace(open_checkpoint(GUIDE).config, hidden_size=1024, intermediate_size=512)
    ops = cuda_ops(config, KVCache(config, 2, 16, dtype, device))
    with device:
        up, down = (Fp8Linear(1024, 1024, dtype), Fp8Linear(512, 1024, dtype))
        norm = Norm(1024, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.fill_(1)
    for index, module in enumerate((up, down)):
        weight = normal(*module.weight.shape, device=device, dtype=dtype, seed=index)
        module.load_rows(0, weight * 0.03, lambda stored, target: target.copy_(stored))
    residual = normal(rows, 1024, device=device, dtype=dtype, seed=5)
    activation = Activation("silu", gated=True)
    expected = residual + down(activation(up(norm(residual))))
    stream = Stream(residual.clone(), None, False)
    stream = ops.add(stream, ops.project(stream, norm, up, activation), down)
    parts = 0 if stream.delta is None else stream.delta.float().sum(0)
    assert (
        relative_error((stream.residual.float() + parts) - residual, expected.float() - residual)
        < 0.1  # few rows multiply activations of 16 bits, the reference those of 8
    )
