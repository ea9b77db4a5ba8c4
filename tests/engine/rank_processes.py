"""Runs a function in several processes that have joined as ranks; collects what each returns."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.ops.collectives import Rank
from nanoinfer_engine.parallel.peers import find_meeting_place, join, open_meeting_place


def run_ranks(
    function: Callable[..., Any],
    config: EngineConfig,
    *arguments: Any,
    size: int = 2,
    seconds: float = 120,
) -> list[Any]:
    """`function(config, rank, *arguments)` of each rank; it must be importable by its name."""
    context = multiprocessing.get_context("spawn")
    store = open_meeting_place(size)
    pipes, processes = [], []
    for index in range(size):
        ours, theirs = context.Pipe(duplex=False)
        target = (theirs, function, config, Rank(index, size), store.port, arguments)
        processes.append(context.Process(target=_run, args=target, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    results = []
    try:
        for pipe in pipes:
            assert pipe.poll(seconds), "a rank does not answer"
            result = pickle.loads(pipe.recv_bytes())
            assert not isinstance(result, str), result
            results.append(result[0])
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _run(
    pipe: Connection,
    function: Callable[..., Any],
    config: EngineConfig,
    rank: Rank,
    port: int,
    arguments: tuple[Any, ...],
) -> None:
    result: object
    try:
        config = join(config, rank, find_meeting_place(port, rank.size))
        result = (function(config, rank, *arguments),)
    except Exception:
        result = traceback.format_exc()
    pipe.send_bytes(pickle.dumps(result))  # by value, unlike `send`, which shares tensors' memory
    os._exit(0)
