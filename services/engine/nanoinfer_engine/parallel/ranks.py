"""A model on several devices: this process is rank 0, the others are processes that it starts.

    engine ─▶ ParallelRunner ─┬─▶ ModelRunner            rank 0, in the engine's thread
                              └─ pipe ─▶ ModelRunner     rank 1 … n-1, a process each (`peers`)

Every rank gets every batch and makes the same step of it. All have the same logits and random
numbers, so all draw the same ids: nothing comes back but a failure.
"""

from __future__ import annotations

import atexit
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from nanoinfer_engine.core.batch import Batch, RowResult, Step, StepTiming
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.progress import Progress, report_nothing
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.parallel.peers import REFUSALS, WARM_UP, Lost, Peers, join
from nanoinfer_engine.step.runner import ModelRunner
from nanoinfer_engine.weights.checkpoints import Checkpoint

_POLL_SECONDS = 1e-4


class ParallelRunner:
    """Runs one model on several devices; a `batch.Runner`."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress = report_nothing,
        checkpoint: Checkpoint | None = None,
        lost: Lost | None = None,
    ) -> None:
        """Start the other ranks and load this one's share.

        `lost` is told, from a thread of its own, of a rank that is gone: whoever waits for a device
        may then wait forever. Raises what `ModelRunner` raises.
        """
        _check_devices(config)
        self._peers = Peers(config, checkpoint, lost)
        try:
            rank = Rank(0, config.tensor_parallel)
            config = join(config, rank, self._peers.store)
            self._runner = ModelRunner(config, progress, checkpoint, rank)
        except Exception as error:
            cause = error if isinstance(error, REFUSALS) else self._peers.cause(error)
            self.close()
            if cause is error:
                raise
            raise cause from error
        self.num_blocks = self._runner.num_blocks
        self.block_size = self._runner.block_size
        self.max_model_len = self._runner.max_model_len
        self.num_parameters = self._runner.num_parameters
        self.weights_fingerprint = self._runner.weights_fingerprint
        self.number_format = self._runner.number_format
        self.model_config = self._runner.model_config
        atexit.register(self.close)

    @property
    def vocab_size(self) -> int:
        """Ids the model accepts and produces: 0 … vocab_size - 1."""
        return self._runner.vocab_size

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before the step has run."""
        return self._runner.runs_ahead

    def launch(self, batch: Batch) -> Step:
        """Begin a step on every rank; RankError, here or for its results, where any fails."""
        with self._peers.watched():
            self._peers.send(batch)
            return _WatchedStep(self._runner.launch(batch), self._peers)

    def warm_up(self) -> float:
        """Run made-up steps on every rank; returns the seconds they took."""
        with self._peers.watched():
            self._peers.send(WARM_UP)
            return self._runner.warm_up()

    def close(self) -> None:
        """End the other ranks. Where nobody calls it, they end with this process."""
        atexit.unregister(self.close)
        self._peers.close()
        # NCCL's is left to the end of the process: it would wait for graphs that hold it
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


class _WatchedStep:
    """A step that fails, instead of never ending, where a rank is gone."""

    def __init__(self, step: Step, peers: Peers) -> None:
        self._step, self._peers = step, peers
        self._polled = 0.0

    def results(self) -> list[RowResult]:
        """One result per row."""
        began = time.perf_counter()
        with self._peers.watched():
            while not getattr(self._step, "is_done", True):
                self._peers.check()
                time.sleep(_POLL_SECONDS)
            self._polled += time.perf_counter() - began
            return self._step.results()

    def timing(self) -> StepTiming | None:
        """After `results`: what this rank's device did."""
        timing = self._step.timing()
        return timing and replace(timing, waited=timing.waited + self._polled)


def _check_devices(config: EngineConfig) -> None:
    """ValueError where the ranks have no device each."""
    size, device = config.tensor_parallel, config.device
    if device not in ("cpu", "cuda"):
        raise ValueError(f"tensor_parallel {size} needs device cpu or cuda, not {device}")
    if device == "cuda" and size > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"tensor_parallel is {size}, but CUDA devices here are {count}")
