"""What is found among cuBLASLt's algorithms multiplies as torch does, and is no slower."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanoinfer_engine.ops.cuda.algorithms import shortlist
from nanoinfer_engine.ops.cuda.kernels.cublaslt import Algorithm, multiply, proposals, variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def weights(count: int, outputs: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.randn(outputs, columns, device="cuda", dtype=dtype) * columns**-0.5
        for _ in range(count)
    ]


def relative_error(x: torch.Tensor, weight: torch.Tensor, algorithm: Algorithm) -> float:
    """Of the product added to ones."""
    output = torch.ones(len(x), len(weight), device="cuda", dtype=x.dtype)
    multiply(x, weight, output, algorithm, add=True)
    expected = x.double() @ weight.double().t() + 1
    return float((output.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 96, 1000])
@pytest.mark.parametrize("joins", [False, True])
def test_the_listed_multiply_as_torch_does(rows: int, dtype: torch.dtype, joins: bool) -> None:
    own = weights(3, 768, 512, dtype)
    listed = shortlist(own, rows, joins=joins)
    assert 1 <= len(listed) <= 3
    assert len(set(listed)) == len(listed)
    bound = 1e-3 if dtype == torch.float16 else 8e-3
    for count in (rows, rows - 3):  # the sizes below a tuned one use its choice
        x = torch.randn(count, 512, device="cuda", dtype=dtype)
        for algorithm in listed:
            assert relative_error(x, own[0], algorithm) < bound


def test_variants_multiply_too() -> None:
    """Whatever the options mean: what is wrong is not listed, and most are right."""
    (weight,) = weights(1, 768, 512, torch.float16)
    x = torch.randn(200, 512, device="cuda", dtype=torch.float16)
    proposed = proposals(200, weight)
    found = {
        variant
        for each in proposed
        for variant in variants(each, (each.tile,), (2, 3, 5), range(10), 200, weight)
    }
    assert len(found) > len(proposed)
    assert {2, 3, 5} <= {each.cluster for each in found}
    wrong = [each for each in found if not relative_error(x, weight, each) < 1e-3]
    assert len(wrong) < 0.1 * len(found), wrong


def test_there_are_none_for_a_dtype_that_is_not_multiplied_so() -> None:
    assert shortlist(weights(1, 64, 64, torch.float32), 8, joins=False) == []
