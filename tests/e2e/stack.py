"""Starts the three services as real processes on loopback and ends them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanoinfer import health
from nanoinfer.cli.processes import ServiceProcess

START_SECONDS = 60.0


class Service(ServiceProcess):
    """A running service, whose log is a file."""

    log: Path

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, seconds: float = 60.0) -> int:
        return self.process.wait(timeout=seconds)

    def logged(self, text: str, count: int = 1, seconds: float = START_SECONDS) -> str:
        """The log once it has a text so many times; a thread of its own writes it, a bit later."""
        end = time.monotonic() + seconds
        while (log := self.log.read_text()).count(text) < count:
            assert time.monotonic() < end, f"no {text!r} in the log:\n{log[-4000:]}"
            time.sleep(0.02)
        return log

    def health(self, name: str) -> str:
        """The health name's status, or NOT_FOUND / UNAVAILABLE."""
        return health.check(self.address, name, 2)

    def await_ready(self) -> None:
        self.await_start(START_SECONDS)


@contextmanager
def start_service(
    module: str,
    arguments: Sequence[str],
    directory: Path,
    environment: Mapping[str, str] | None = None,
    ready: bool = True,
) -> Iterator[Service]:
    """Runs `python -m module` on a free port; ends it at exit, by force where it must."""
    directory.mkdir(parents=True, exist_ok=True)
    port_file = directory / f"{module}-{time.monotonic_ns()}.port"
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", "0"]
    command += ["--metrics-port", "0", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    log = port_file.with_suffix(".log")
    service = Service(module, command, port_file, variables, log=log)
    try:
        service.await_start(START_SECONDS, ready=ready)
        yield service
    finally:
        service.stop(60)


@dataclass(frozen=True)
class Stack:
    """The three services, running."""

    tokenizer: Service
    engine: Service
    gateway: Service


@contextmanager
def start_stack(
    model: Path,
    directory: Path,
    *,
    engine_flags: Sequence[str] = (),
    gateway_flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """All three on one model; the gateway last, because its readiness needs the others."""
    with ExitStack() as stack:

        def start(module: str, arguments: Sequence[str], ready: bool = True) -> Service:
            context = start_service(module, arguments, directory, environment, ready)
            return stack.enter_context(context)

        arguments = ["--model", str(model)]
        engine = start(
            "nanoinfer_engine", [*arguments, "--threads", "1", *engine_flags], ready=False
        )
        tokenizer = start("nanoinfer_tokenizer", arguments, ready=False)
        tokenizer.await_ready()
        engine.await_ready()
        upstreams = ["--tokenizer", tokenizer.address, "--engine", engine.address]
        gateway = start("nanoinfer_gateway", [*upstreams, *gateway_flags])
        yield Stack(tokenizer, engine, gateway)
