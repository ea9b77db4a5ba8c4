"""Where the GPU tests run: on the CUDA device, or in Triton's interpreter where it is asked for."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """TRITON_INTERPRET=1 checks the kernels' logic on the CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
