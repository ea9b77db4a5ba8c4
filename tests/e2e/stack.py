"""Starts the three services as real processes on loopback and ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_SECONDS = 60.0


@dataclass(frozen=True)
class Service:
    """A running service: its process, address and where its log goes."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

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
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=2)
            except grpc.RpcError as error:
                return str(error.code().name)
            return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def await_ready(service: Service, seconds: float = START_SECONDS) -> None:
    end = time.monotonic() + seconds
    while service.health("readiness") != "SERVING":
        if service.process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"not ready:\n{service.log.read_text()[-4000:]}")
        time.sleep(0.1)


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
    log = port_file.with_suffix(".log")
    flags = ["--host", "127.0.0.1", "--port", "0", "--port-file", str(port_file)]
    flags += ["--metrics-port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not (port_file.exists() and port_file.read_text().strip()):
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{module} did not listen:\n{log.read_text()[-4000:]}")
            time.sleep(0.05)
        port = port_file.read_text().split()[-1].rpartition(":")[2]
        service = Service(process, f"127.0.0.1:{port}", log)
        if ready:
            await_ready(service)
        yield service
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
        await_ready(tokenizer)
        await_ready(engine)
        upstreams = ["--tokenizer", tokenizer.address, "--engine", engine.address]
        gateway = start("nanoinfer_gateway", [*upstreams, *gateway_flags])
        yield Stack(tokenizer, engine, gateway)
