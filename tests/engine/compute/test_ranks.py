"""A rank that dies or cannot start takes the model with it, soon and saying why."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.core.batch import Batch, BatchRow
from nanoinfer_engine.core.config import CheckpointError, EngineConfig
from nanoinfer_engine.core.errors import RankError, is_device_error
from nanoinfer_engine.parallel.ranks import ParallelRunner
from nanoinfer_engine.weights.checkpoints import Part, SafetensorsCheckpoint

from tests.engine.compute.driver import GREEDY

GUIDE = Path(__file__).resolve().parents[3] / "models" / "guide"


@pytest.mark.slow
def test_a_rank_that_dies_loses_the_model() -> None:
    told: list[Exception] = []
    is_told = threading.Event()

    def lost(error: Exception) -> None:
        told.append(error)
        is_told.set()

    config = EngineConfig(GUIDE, kv_cache_bytes=8 << 20, num_threads=1, tensor_parallel=2)
    runner = ParallelRunner(config, lost=lost)
    try:
        (process,) = runner._peers._processes
        batch = Batch((BatchRow((5, 6, 7), 0, (0,), True, GREEDY),))
        assert isinstance(runner.launch(batch).results()[0], tuple)
        process.kill()
        with pytest.raises(RankError, match="rank 1 has ended with exit code -9") as caught:
            runner.launch(batch).results()
        assert is_device_error(caught.value)
        assert is_told.wait(60)
        assert "rank 1" in str(told[0])
    finally:
        runner.close()


class UnreadableElsewhere(SafetensorsCheckpoint):
    """A checkpoint that only the first process can read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return UnreadableElsewhere, (self.directory,)

    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        if multiprocessing.parent_process() is not None:
            raise CheckpointError(f"{name}: not here")
        return super().read(name, part)


@pytest.mark.slow
def test_a_start_that_fails_on_one_rank() -> None:
    config = EngineConfig(GUIDE, kv_cache_bytes=8 << 20, num_threads=1, tensor_parallel=2)
    before = set(multiprocessing.active_children())
    with pytest.raises(CheckpointError, match=r"not here"):
        ParallelRunner(config, checkpoint=UnreadableElsewhere(GUIDE))
    assert set(multiprocessing.active_children()) == before
    assert not torch.distributed.is_initialized()
