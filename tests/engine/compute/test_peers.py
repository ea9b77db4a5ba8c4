"""Rank 0 learns of a rank that has ended, whatever that rank sent as its last words."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from typing import Any

from nanoinfer_engine.core.errors import RankError
from nanoinfer_engine.parallel.peers import Peers


def refuse() -> None:
    raise ValueError("nothing that this process knows")


class Unreadable:
    """An object that cannot be made where it arrives."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return refuse, ()


class EndedProcess:
    """A process that has ended, as far as its peers look."""

    exitcode = 1

    def __init__(self) -> None:
        # a pipe whose other end is closed is ready, as an ended process's sentinel is
        self.sentinel, theirs = multiprocessing.Pipe()
        theirs.close()

    def join(self, seconds: float) -> None:
        assert seconds > 0


def test_last_words_that_cannot_be_read_still_lose_the_model() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send(Unreadable())
    told: list[Exception] = []
    peers: Any = object.__new__(Peers)
    peers._pipes, peers._processes, peers._closing = [ours], [EndedProcess()], False
    peers._failure, peers._failed, peers._lost = None, threading.Event(), told.append
    peers._watch()
    assert peers._failed.is_set()
    assert isinstance(told[0], RankError)
    assert "nothing that this process knows" in str(told[0])


def test_an_orphaned_rank_ends_even_where_it_cannot_watch_its_parent() -> None:
    program = (
        "import threading\n"
        "from unittest import mock\n"
        "from nanoinfer_engine import peers\n"
        "peers.wait = mock.Mock(side_effect=OSError('no more files'))\n"
        "peers.multiprocessing = mock.Mock()\n"
        "threading.Thread(target=peers._end_with_parent).start()\n"
        "threading.Event().wait(30)\n"  # what a rank would go on with
    )
    result = subprocess.run([sys.executable, "-c", program], check=False, timeout=120)
    assert result.returncode == 1
