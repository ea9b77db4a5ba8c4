"""Runs chat templates in processes that can be killed.

Each rendering goes to an idle worker process (`template_worker`). One that answers too late or not
at all is killed, and the next rendering starts another in its place.
"""

import json
import queue
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any

from nanoinfer_tokenizer import template_worker
from nanoinfer_tokenizer.encodings import TokenizerFileError

_START_SECONDS = 60.0  # a cold Python start on a busy machine


class TemplateRefusedError(ValueError):
    """The template does not accept these messages; the text is the template's own."""


class TemplateTimeoutError(RuntimeError):
    """The template ran for too long or produced too much."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Bounds of one rendering, and the number of worker processes."""

    timeout_seconds: float = 2.0
    max_characters: int = 1_000_000
    max_memory_bytes: int = 1 << 30
    num_workers: int = 2


class TemplateProcesses:
    """A fixed number of worker processes that share one template. Safe to use from threads."""

    def __init__(self, template: str, variables: Mapping[str, Any], limits: TemplateLimits) -> None:
        """Starts the workers. Raises `TokenizerFileError` where the template does not compile."""
        self._limits = limits
        self._setup = json.dumps(
            {
                "template": template,
                "variables": dict(variables),
                "timeout": limits.timeout_seconds,
                "max_characters": limits.max_characters,
                "max_memory": limits.max_memory_bytes,
            }
        ).encode()
        # None stands for a worker that has to be started.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(limits.num_workers - 1):
            self._idle.put(None)
        # On top: the first rendering finds a worker that is ready.
        self._idle.put(_Worker(self._setup))

    def render(
        self, variables: Mapping[str, Any], stand_ins: Mapping[str, str] | None = None
    ) -> str:
        """Renders in an idle worker, which looks through `stand_ins` (see `guard`).

        Raises `TemplateRefusedError` or `TemplateTimeoutError`.
        """
        request = json.dumps({"variables": variables, "stand_ins": stand_ins or {}}).encode()
        with self._worker() as worker:
            answer = worker.ask(request, self._limits.timeout_seconds)
        if "refused" in answer:
            raise TemplateRefusedError(answer["refused"])
        if "text" not in answer:
            raise TemplateTimeoutError(f"more than {self._limits.max_characters} characters")
        return str(answer["text"])

    @contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        worker = self._idle.get()
        try:
            if worker is None or worker.dead:
                worker = _Worker(self._setup)
            yield worker
        finally:
            # A worker that failed in the middle of an exchange is of no further use.
            self._idle.put(None if worker is None or worker.dead else worker)

    def close(self) -> None:
        """Ends the workers. Renderings under way must have ended."""
        for _ in range(self._limits.num_workers):
            if (worker := self._idle.get()) is not None:
                worker.kill()


class _Worker:
    """One worker process and the connection to it."""

    def __init__(self, setup: bytes) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            # -P keeps this package's folder, with its module names, out of the worker's imports.
            self._process = subprocess.Popen(
                [sys.executable, "-P", template_worker.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._killed = False
        try:
            answer = self.ask(setup, _START_SECONDS)
        except TemplateTimeoutError as error:
            raise TokenizerFileError(f"the chat template could not be set up: {error}") from error
        if "error" in answer:
            self.kill()
            raise TokenizerFileError(f"the chat template does not compile: {answer['error']}")

    @property
    def dead(self) -> bool:
        return self._killed or self._process.poll() is not None

    def ask(self, data: bytes, timeout: float) -> dict[str, Any]:
        """Sends `data` and waits; kills the process and raises where no answer comes in time."""
        try:
            self._connection.send_bytes(data)
            if self._connection.poll(timeout):
                answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
                return answer
        except (EOFError, OSError) as error:
            self.kill()
            raise TemplateTimeoutError("the template's process ended") from error
        self.kill()
        raise TemplateTimeoutError(f"no answer within {timeout} s")

    def kill(self) -> None:
        self._killed = True
        self._process.kill()
        self._process.wait()
        self._connection.close()
