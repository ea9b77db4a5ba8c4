"""Starts services for a measurement: real processes on loopback, no tracing."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from nanoinfer.cli.console import CommandError
from nanoinfer.cli.processes import ServiceProcess


@dataclass(frozen=True)
class Running:
    """A service: where it answers, and its process."""

    address: str
    pid: int

    def processor_seconds(self) -> float:
        """User and system time so far, with that of its children, also of those that ended."""
        process = psutil.Process(self.pid)
        seconds = 0.0
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):  # ended since: it is in its parent's times
                seconds += sum(each.cpu_times()[:4])
        return seconds


@dataclass(frozen=True)
class Stack:
    """The services of one model."""

    tokenizer: Running
    engine: Running
    gateways: tuple[Running, ...]


@contextmanager
def service(module: str, *flags: str, seconds: float = 120) -> Iterator[Running]:
    """Runs a module, or a file, and yields it once it is ready; ends it afterwards."""
    program = [module] if module.endswith(".py") else ["-m", module]
    command = [sys.executable, *program, "--port", "0", "--metrics-port", "0"]
    command += ["--log-level", "warning", *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    with tempfile.TemporaryDirectory() as directory:
        started = ServiceProcess(module, command, Path(directory, "port"), environment)
        try:
            try:
                started.await_start(seconds)
            except CommandError as error:
                raise SystemExit(str(error)) from error
            yield Running(started.address, started.process.pid)
        finally:
            started.stop(30)


@contextmanager
def stack(
    model: Path,
    engine_flags: Sequence[str] = (),
    seconds: float = 120,
    num_gateways: int = 1,
    engine_module: str = "nanoinfer_engine",
) -> Iterator[Stack]:
    """Tokenizer, engine and gateways on one model; the engine may take `seconds` to start."""
    arguments = ["--model", str(model)]
    with ExitStack() as services:
        enter = services.enter_context
        tokenizer = enter(service("nanoinfer_tokenizer", *arguments))
        engine = enter(service(engine_module, *arguments, *engine_flags, seconds=seconds))
        upstreams = ["--tokenizer", tokenizer.address, "--engine", engine.address]
        gateways = [enter(service("nanoinfer_gateway", *upstreams)) for _ in range(num_gateways)]
        yield Stack(tokenizer, engine, tuple(gateways))
