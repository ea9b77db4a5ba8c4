"""The processes of a model's other ranks: how they meet, what they do, how they end.

A rank that fails or ends leaves the others waiting in a collective, so the model is lost with it; a
thread of rank 0 watches for that. A rank ends when rank 0 closes its pipe, or with its process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from nanoinfer_engine.core.batch import Batch
from nanoinfer_engine.core.config import CheckpointError, EngineConfig
from nanoinfer_engine.core.errors import RankError
from nanoinfer_engine.core.progress import report_nothing
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.step.runner import ModelRunner, default_threads
from nanoinfer_engine.weights.checkpoints import Checkpoint

REFUSALS = (CheckpointError, ValueError, OSError)
"""What a start can be refused with; it says by itself what is wrong."""

WARM_UP = "warm up"
"""The task that is no batch."""

_HOST = "127.0.0.1"
# how long rank 0 looks for whose failure it has run into, and a rank has to end by itself
_GRACE_SECONDS = 2.0

Lost = Callable[[Exception], None]


def open_meeting_place(size: int) -> TCPStore:
    """Where `size` ranks find each other; its `port` is open on the loopback interface alone."""
    with socket.create_server((_HOST, 0)) as server:
        port, descriptor = server.getsockname()[1], os.dup(server.fileno())
    return TCPStore(
        _HOST, port, size, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )


def find_meeting_place(port: int, size: int) -> TCPStore:
    """The one that another process has opened."""
    return TCPStore(_HOST, port, size, is_master=False, wait_for_workers=False)


def join(config: EngineConfig, rank: Rank, store: TCPStore) -> EngineConfig:
    """Meet the other ranks; returns the configuration of this one.

    To be called once in a process, in the thread that runs the model. Nothing listens outside the
    loopback interface.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    if config.device == "cuda":
        device = torch.device("cuda", rank.index)
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl", store=store, rank=rank.index, world_size=rank.size, device_id=device
        )
        return replace(config, device=str(device))
    dist.init_process_group("gloo", store=store, rank=rank.index, world_size=rank.size)
    threads = config.num_threads or max(default_threads() // rank.size, 1)
    return replace(config, num_threads=threads)


class Peers:
    """The processes of the other ranks."""

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint | None, lost: Lost | None
    ) -> None:
        """Start them; `lost` is told once, from a thread of its own, of one that has ended."""
        self.store = open_meeting_place(config.tensor_parallel)
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
                args=(theirs, config, checkpoint, rank, self.store.port),
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

    def _watch(self) -> None:
        ended = wait([process.sentinel for process in self._processes])
        if self._closing:
            return
        index = next(i for i, each in enumerate(self._processes) if each.sentinel in ended)
        try:
            self._failure = self._last_words(index)
        except Exception as error:  # what a rank sent cannot be read; it is lost all the same
            self._failure = RankError(f"rank {index + 1} has ended: {error!r}")
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


def _run_rank(
    pipe: Connection,
    config: EngineConfig,
    checkpoint: Checkpoint | None,
    rank: Rank,
    port: int,
) -> None:
    """What another rank's process does, until rank 0 closes the pipe or is gone."""
    # signals to the whole group mean rank 0, which drains first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="nanoinfer-parent", daemon=True).start()
    code, runner = 0, None
    try:
        config = join(config, rank, find_meeting_place(port, rank.size))
        runner = ModelRunner(config, report_nothing, checkpoint, rank)
        while True:
            message = pipe.recv()
            if isinstance(message, Batch):
                runner.launch(message)
            else:
                runner.warm_up()
    except EOFError:
        pass
    except Exception as error:
        failure: Exception = error
        if runner is not None or not isinstance(error, REFUSALS):  # it was not refused, it failed
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
        try:
            wait([parent.sentinel])
        finally:  # a rank that cannot watch its parent must not outlive it
            os._exit(1)
