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


@pytest.fixture(scope="session", autouse=True)
def _threads_of_this_worker() -> None:
    """Workers that compute on the CPU, too, share its cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
