"""Copies in parts equal copies at once."""

from __future__ import annotations

import pytest
import torch
from nanoinfer_engine.weights.staging import Staging

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_make_the_whole(size: int, stored: torch.dtype) -> None:
    staging = Staging(CPU, buffer_bytes=256)
    for _ in range(3):
        source = torch.randn(size, 3).to(stored)
        target = torch.full((size + 2, 3), float("nan"), dtype=torch.float16)
        staging.copy(source, target[1:-1])
        assert torch.equal(target[1:-1], source.to(torch.float16))
        assert target[[0, -1]].isnan().all()


def test_what_does_not_lie_in_one_piece() -> None:
    source = torch.randn(5, 7)
    staging, target = Staging(CPU, buffer_bytes=16), torch.empty(7, 5)
    staging.copy(source.t(), target)
    assert torch.equal(target, source.t())
    staging.copy(source, target.t())
    assert torch.equal(target.t(), source)
