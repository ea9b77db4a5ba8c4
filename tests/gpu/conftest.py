"""Where the GPU tests run: on the CUDA device, or in Triton's interpreter where it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from nanoinfer_engine.choices import ChoiceFile


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
def _choices_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an earlier session chose is not found: choosing is tested, too."""
    if not torch.cuda.is_available():
        yield
        return
    from nanoinfer_engine import device  # needs Triton

    directory = tmp_path_factory.mktemp("choices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            device,
            "ChoiceFile",
            lambda _, facts, kinds: ChoiceFile(directory, facts, kinds),
        )
        yield
