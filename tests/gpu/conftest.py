"""Where the GPU tests run: on the CUDA device, or in Triton's interpreter where it is asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.interpreted import INTERPRETED, patch_language_once


def pytest_configure(config: pytest.Config) -> None:
    """Let the interpreter compute as a card does.

    It takes arrays of one element for numbers, as numpy before 2.4 allows, and numpy warns of
    infinities and NaN, which kernels compute with where rows are padding.
    """
    if INTERPRETED:
        deprecated = "Conversion of an array with ndim > 0:DeprecationWarning"
        for warning in (deprecated, ":RuntimeWarning"):
            config.addinivalue_line("filterwarnings", f"ignore:{warning}:(triton|numpy)")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """TRITON_INTERPRET=1 checks the kernels' logic on the CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if INTERPRETED:
        return torch.device("cpu")
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED and importlib.util.find_spec("triton"):
            patch_language_once(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _threads_of_this_worker() -> None:
    """Workers that compute on the CPU, too, share its cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
