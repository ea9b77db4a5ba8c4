"""Starts services for a measurement: real processes on loopback, no tracing, logs to files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer_common.channels import DIRECT


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


def _is_ready(address: str) -> bool:
    with grpc.insecure_channel(address, DIRECT) as channel:
        request = health_pb2.HealthCheckRequest(service="readiness")
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def service(module: str, *flags: str, seconds: float = 120) -> Iterator[Running]:
    """Runs a module, or a file, and yields it once it is ready; ends it afterwards."""
    program = [module] if module.endswith(".py") else ["-m", module]
    with tempfile.TemporaryDirectory() as directory:
        port_file, log = Path(directory, "port"), Path(directory, "log")
        common = ["--port", "0", "--port-file", str(port_file), "--metrics-port", "0"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *program, *common, "--log-level", "warning", *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            end = time.monotonic() + seconds
            while True:
                text = port_file.read_text().strip() if port_file.exists() else ""
                if text and _is_ready(address := f"127.0.0.1:{text.rpartition(':')[2]}"):
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{module} is not ready:\n{log.read_text()}")
                time.sleep(0.1)
            yield Running(address, process.pid)
        finally:
            process.terminate()
            process.wait(30)


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
