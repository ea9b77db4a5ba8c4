"""The recipe lives beside the model, outside the packages: its folder joins the path here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "models" / "guide"
sys.path.insert(0, str(GUIDE))


@pytest.fixture(scope="session")
def guide() -> Path:
    return GUIDE


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps so small a model on one thread; on a busy machine barriers cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
