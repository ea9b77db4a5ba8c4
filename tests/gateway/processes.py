"""The gateway as a process of its own, before fakes of this one."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nanoinfer.v1 import gateway_pb2_grpc

from tests.gateway.fakes import eventually


@dataclass(frozen=True)
class GatewayProcess:
    """Its address, process id, log, and a stub."""

    address: str
    pid: int
    log: Path
    stub: Any
    channel: grpc.aio.Channel


async def readiness(channel: grpc.aio.Channel) -> str:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"))
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


async def become(channel: grpc.aio.Channel, wanted: str) -> bool:
    """Waits until readiness is what is wanted."""
    async with asyncio.timeout(60):
        while await readiness(channel) != wanted:
            await asyncio.sleep(0.02)
    return True


@asynccontextmanager
async def gateway_process(
    tokenizer: str,
    engine: str,
    directory: Path,
    *,
    program: Sequence[str] = ("-m", "nanoinfer_gateway"),
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[GatewayProcess]:
    """Runs it until the block ends; it is ready in there."""
    port_file, log = directory / "port", directory / "log"
    fixed = ["--tokenizer", tokenizer, "--engine", engine, "--port", "0"]
    fixed += ["--metrics-port", "none", "--port-file", str(port_file)]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *program, *fixed, *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
        )
    try:
        await eventually(lambda: port_file.exists() or process.returncode is not None, 60)
        assert process.returncode is None, log.read_text()
        address = port_file.read_text().split()[-1]
        async with grpc.aio.insecure_channel(address) as channel:
            await become(channel, "SERVING")
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            yield GatewayProcess(address, process.pid, log, stub, channel)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
