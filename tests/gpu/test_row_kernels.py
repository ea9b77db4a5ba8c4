"""Norms, activation, embedding and the small matrix products against plain PyTorch in float32."""

from __future__ import annotations

import pytest
import torch
from nanoinfer_engine.ops.modules import ACTIVATIONS
from torch import Tensor

from tests.gpu.interpreted import choose_here

norms = pytest.importorskip("nanoinfer_engine.ops.cuda.kernels.norms")
linear = pytest.importorskip("nanoinfer_engine.ops.cuda.kernels.linear")

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
OUTPUTS = choose_here(70, 10)
"""Outputs of a GEMV: no multiple of 4, and their half is odd, so that blocks are cut."""

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * gain.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 1024, 4096])
def test_add_norm(width: int, dtype: torch.dtype, device: torch.device) -> None:
    residual = normal(5, width, device=device, dtype=dtype)
    parts = normal(3, 5, width, device=device, dtype=torch.float32)
    gain = normal(width, device=device, dtype=dtype)
    total = (residual.float() + parts.sum(0)).to(dtype)
    output = torch.empty_like(residual)
    norms.add_norm(residual, parts, gain, 1e-5, output)
    assert relative_error(residual, total) < BOUND[dtype]
    assert relative_error(output, rms_norm(total, gain, 1e-5)) < BOUND[dtype]
    kept = residual.clone()
    norms.add_norm(residual, None, gain, 1e-5, output)
    assert torch.equal(residual, kept)
    assert relative_error(output, rms_norm(kept, gain, 1e-5)) < BOUND[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1000, 3072])
def test_gate_mul(width: int, activation: str, device: torch.device) -> None:
    x = normal(3, 2 * width, device=device, dtype=torch.float16)
    x[:, :4] = torch.tensor([-300.0, -12, 12, 300])  # infinity within, not at the end
    gate, up = x.float().chunk(2, -1)
    expected = ACTIVATIONS[activation](gate) * up
    actual = norms.gate_mul(x, activation)
    assert relative_error(actual[:, 4:], expected[:, 4:]) < 2e-3
    assert torch.allclose(actual[:, :4], expected[:, :4].half(), rtol=2e-3, atol=1e-6)


def test_embed(device: torch.device) -> None:
    table = normal(50, 384, device=device, dtype=torch.float16)
    tokens = torch.tensor([3, 4, 5, 6], dtype=torch.int32, device=device)
    sources = torch.tensor([-1, 1, 0, 2], dtype=torch.int32, device=device)
    sampled = torch.tensor([40, 41, -1], dtype=torch.int32, device=device)
    output = torch.empty((4, 384), dtype=torch.float16, device=device)
    norms.embed(tokens, sources, sampled, table, output)
    assert torch.equal(output, table[torch.tensor([3, 41, 40, 0], device=device)])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_products_end_in_the_activation_that_is_asked_for(
    activation: str, device: torch.device
) -> None:
    weight = normal(96, 256, device=device, dtype=torch.float16) / 16
    x = normal(8, 256, device=device, dtype=torch.float16, seed=2)
    gate, up = (x.float() @ weight.float().T).chunk(2, -1)
    expected = ACTIVATIONS[activation](gate) * up
    one = torch.full((1, 48), float("nan")).to(device, torch.float16)
    shape = linear.GemvShape(2, 256, 2)
    linear.gemv(x[:1], weight, one, shape, gated=True, activation=activation)
    assert relative_error(one, expected[:1]) < 2e-3
    few = torch.full((1, 8, 48), float("nan")).to(device, torch.float16)
    tile = linear.TileShape(16, 128, 1, 2, 3)
    linear.few_rows(x, weight, few, tile, gated=True, activation=activation)
    assert relative_error(few[0], expected) < 2e-3
    # the forms are so close that only their difference tells them apart
    other = ACTIVATIONS["silu"](gate) * up
    assert relative_error(few[0], other) > 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [384, 1024, 3072])
@pytest.mark.parametrize("block", [(1, 1024, 1), (2, 512, 2), (4, 256, 4)])
def test_gemv(
    block: tuple[int, int, int], columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    shape = linear.GemvShape(*block)
    weight = normal(OUTPUTS, columns, device=device, dtype=dtype) * columns**-0.5
    x, gain = (normal(*s, device=device, dtype=dtype, seed=9) for s in ((1, columns), (columns,)))
    bias = normal(OUTPUTS, device=device, dtype=dtype)
    plain = x.float() @ weight.float().T
    normed = rms_norm(x, gain, 1e-6) @ weight.float().T
    output = torch.full((1, OUTPUTS), float("nan")).to(device, dtype)
    linear.gemv(x, weight, output, shape, bias=bias)
    assert relative_error(output, plain + bias.float()) < BOUND[dtype]
    linear.gemv(x, weight, output, shape, gain=gain, eps=1e-6)
    assert relative_error(output, normed) < BOUND[dtype]
    held = normal(1, OUTPUTS, device=device, dtype=dtype, seed=4)
    output.copy_(held)
    linear.gemv(x, weight, output, shape, residual=True)
    assert relative_error(output, held.float() + plain) < BOUND[dtype]
    half = OUTPUTS // 2
    gated = torch.full((1, half), float("nan")).to(device, dtype)
    linear.gemv(x, weight, gated, shape, gain=gain, eps=1e-6, gated=True)
    expected = torch.nn.functional.silu(normed[:, :half]) * normed[:, half:]
    assert relative_error(gated, expected) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 8, 17, 33, 64])
@pytest.mark.parametrize("tile", [(16, 256, 4, 2, 3), (64, 128, 1, 4, 3), (32, 256, 2, 4, 3)])
def test_few_rows(
    tile: tuple[int, int, int, int, int], rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16 matrices")
    shape = linear.TileShape(*tile)
    weight = normal(208, 1024, device=device, dtype=dtype) / 32
    x = normal(rows, 1024, device=device, dtype=dtype, seed=3)
    plain = x.float() @ weight.float().T
    parts = torch.full((shape.splits, rows, 208), float("nan"), device=device)
    linear.few_rows(x, weight, parts, shape)
    assert relative_error(parts.sum(0), plain) < BOUND[dtype]
    if shape.splits > 1:
        return
    bias = normal(208, device=device, dtype=dtype)
    output = torch.full((1, rows, 104), float("nan")).to(device, dtype)
    linear.few_rows(x, weight, output, shape, bias=bias, gated=True)
    gate, up = (plain + bias.float()).chunk(2, -1)
    assert relative_error(output[0], torch.nn.functional.silu(gate) * up) < BOUND[dtype]
