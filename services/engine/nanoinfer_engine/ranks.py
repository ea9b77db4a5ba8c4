"""A model on several devices: this process is rank 0, the others are processes that it starts.

    engine ─▶ ParallelRunner ─┬─▶ ModelRunner            rank 0, in the engine's thread
                              └─ pipe ─▶ ModelRunner     rank 1 … n-1, a process each

Every rank gets every batch and makes the same step of it. All have the same logits and random
numbers, so all draw the same ids: nothing comes back but a failure. A rank that fails or ends
leaves the others waiting in a collective, so the model is lost with it; a thread watches for that.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from nanoinfer_engine.batch import Batch, RowResult, Step
from nanoinfer_engine.checkpoints import Checkpoint
from nanoinfer_engine.collectives import Rank
from nanoinfer_engine.config import CheckpointError, EngineConfig
from nanoinfer_engine.errors import RankError
from nanoinfer_engine.runner import ModelRunner, report_nothing
from nanoinfer_engine.weights import Progress

_WARM_UP = "warm up"
# what a start can be refused with; it says by itself what is wrong
_REFUSALS = (CheckpointError, ValueError, OSError)
# how long rank 0 looks for whose failure it has run into, and a rank has to end by itself
_GRACE_SECONDS = 2.0
_POLL_SECONDS = 1e-4

Lost = Callable[[Exception], None]


def join(config: EngineConfig, rank: Rank, directory: Path) -> EngineConfig:
    """Meet the other ranks over a file in `directory`; returns the configuration of this rank.

    To be called once in a process, in the thread that runs the model. Nothing listens outside the
    loopback interface.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    store = dist.FileStore(str(directory / "store"), rank.size)  # type: ignore[attr-defined]
    if config.device == "cuda":
        device = torch.device("cuda", rank.index)
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl", store=store, rank=rank.index, world_size=rank.size, device_id=device
        )
        return replace(config, device=str(device))
    dist.init_process_group("gloo", store=store, rank=rank.index, world_size=rank.size)
    threads = config.num_threads or max(torch.get_num_threads() // rank.size, 1)
    return replace(config, num_threads=threads)


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
        self._peers = _Peers(config, checkpoint, lost)
        try:
            rank = Rank(0, config.tensor_parallel)
            config = join(config, rank, self._peers.directory)
            self._runner = ModelRunner(config, progress, checkpoint, rank)
        except Exception as error:
            cause = error if isinstance(error, _REFUSALS) else self._peers.cause(error)
            self.close()
            if cause is error:
                raise
            raise cause from error
        self.num_blocks = self._runner.num_blocks
        self.block_size = self._runner.block_size
        self.max_model_len = self._runner.max_model_len
        self.num_parameters = self._runner.num_parameters
        self.weights_fingerprint = self._runner.weights_fingerprint
        self.model_config = self._runner.model_config
        atexit.register(self.close)

    @property
    def vocab_size(self) -> int:
        """Ids the model accepts and produces: 0 … vocab_size - 1."""
        return self._runner.vocab_size

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before a step of plain rows has run."""
        return self._runner.runs_ahead

    def execute(self, batch: Batch) -> list[RowResult]:
        """Run one step on every rank; RankError where any fails."""
        return self.launch(batch).results()

    def launch(self, batch: Batch) -> Step:
        """Begin a step on every rank."""
        with self._peers.watched():
            self._peers.send(batch)
            return _WatchedStep(self._runner.launch(batch), self._peers)

    def warm_up(self) -> float:
        """Run made-up steps on every rank; returns the seconds they took."""
        with self._peers.watched():
            self._peers.send(_WARM_UP)
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

    def __init__(self, step: Step, peers: _Peers) -> None:
        self._step, self._peers = step, peers

    def results(self) -> list[RowResult]:
        """One result per row."""
        with self._peers.watched():
            while not getattr(self._step, "is_done", True):
                self._peers.check()
                time.sleep(_POLL_SECONDS)
            return self._step.results()


class _Peers:
    """The processes of the other ranks."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint | None, lost: Lost | None):
        self._temporary = tempfile.TemporaryDirectory(prefix="nanoinfer-")
        self.directory = Path(self._temporary.name)
        self._lost = lost
        self._failure: Exception | None = None
        self._failed = threading.Event()
        self._closing = False
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for index in range(1, config.tensor_parallel):
            ours, theirs = context.Pipe()
            rank = Rank(index, config.tensor_parallel)
            process = context.Process(
                target=_run_rank,
                args=(theirs, config, checkpoint, rank, self.directory),
                name=f"nanoinfer-rank-{index}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        threading.Thread(target=self._watch, name="nanoinfer-ranks", daemon=True).start()

    def send(self, message: Batch | str) -> None:
        """Give every rank its next task."""
        self.check()
        for pipe in self._pipes:
            pipe.send(message)

    def check(self) -> None:
        """Raise what a rank failed with, if one has."""
        if self._failure is not None:
            raise RankError(str(self._failure)) from self._failure

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Whatever fails here is a RankError: the ranks have gone apart, and nothing mends that."""
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            cause = self.cause(error)
            raise RankError(f"{type(cause).__name__}: {cause}") from cause

    def cause(self, error: Exception) -> Exception:
        """The failure of another rank, where `error` here only follows from it."""
        self._failed.wait(_GRACE_SECONDS)
        return self._failure or error

    def close(self) -> None:
        """End the processes, by force those that wait for a rank which is gone."""
        self._closing = True
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_GRACE_SECONDS)
            process.kill()
            process.join()
        self._temporary.cleanup()

    def _watch(self) -> None:
        ended = wait([process.sentinel for process in self._processes])
        if self._closing:
            return
        index = next(i for i, each in enumerate(self._processes) if each.sentinel in ended)
        self._failure = self._last_words(index)
        self._failed.set()
        time.sleep(_GRACE_SECONDS)  # who runs into it says it better
        if self._lost is not None and not self._closing:
            self._lost(self._failure)

    def _last_words(self, index: int) -> Exception:
        """What a rank that has ended sent, or how it ended."""
        with contextlib.suppress(EOFError, OSError):
            if self._pipes[index].poll():
                error = self._pipes[index].recv()
                if isinstance(error, Exception):
                    return error
        self._processes[index].join(_GRACE_SECONDS)
        code = self._processes[index].exitcode
        return RankError(f"the process of rank {index + 1} has ended with exit code {code}")


def _check_devices(config: EngineConfig) -> None:
    """ValueError where the ranks have no device each."""
    size, device = config.tensor_parallel, config.device
    if device not in ("cpu", "cuda"):
        raise ValueError(f"tensor_parallel {size} needs device cpu or cuda, not {device}")
    if device == "cuda" and size > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"tensor_parallel is {size}, but CUDA devices here are {count}")


def _run_rank(
    pipe: Connection,
    config: EngineConfig,
    checkpoint: Checkpoint | None,
    rank: Rank,
    directory: Path,
) -> None:
    """What another rank's process does, until rank 0 closes the pipe or is gone."""
    # signals to the whole group mean rank 0, which drains first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="nanoinfer-parent", daemon=True).start()
    code = 0
    try:
        runner = ModelRunner(join(config, rank, directory), report_nothing, checkpoint, rank)
        while True:
            message = pipe.recv()
            if isinstance(message, Batch):
                runner.launch(message)
            else:
                runner.warm_up()
    except EOFError:
        pass
    except _REFUSALS as error:
        code = _report(pipe, error)
    except Exception as error:
        failure = RankError(f"rank {rank.index}: {type(error).__name__}: {error}")
        failure.add_note(traceback.format_exc())
        code = _report(pipe, failure)
    os._exit(code)  # NCCL's threads and a device that hangs could hold the exit up


def _report(pipe: Connection, error: Exception) -> int:
    with contextlib.suppress(OSError):
        pipe.send(error)
    return 1


def _end_with_parent() -> None:
    """End this process with its parent, however that ends and whatever runs here."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
