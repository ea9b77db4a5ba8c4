"""Where the GPU tests run: on the CUDA device, or in Triton's interpreter where it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from nanoinfer_engine.ops.cuda.choices import ChoiceFile


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


@pytest.fixture(scope="session", autouse=True)
def _choices_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an earlier run chose is not found: choosing is tested, too.

    Workers prepare one after another, so that one measures undisturbed what the others then read.
    """
    if not torch.cuda.is_available():
        yield
        return
    from filelock import FileLock
    from nanoinfer_engine import device  # needs Triton
    from nanoinfer_engine.step.device_steps import DeviceSteps

    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "choices"
    directory.mkdir(exist_ok=True)
    lock, prepare = FileLock(directory / "lock"), DeviceSteps.prepare

    def prepare_alone(steps: DeviceSteps) -> None:
        with lock:
            prepare(steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceSteps, "prepare", prepare_alone)
        patch.setattr(
            device,
            "ChoiceFile",
            lambda _, facts, kinds: ChoiceFile(directory, facts, kinds),
        )
        yield
