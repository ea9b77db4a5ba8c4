"""The one way to be a service: listen, load, serve, drain, stop.

`serve` is a process's main function; `running` is the same server inside another program. The port
opens before the service loads, so that health answers from the first moment. A drain flips health,
serves on while clients notice, then sends the connections away, refuses, lets admitted work finish
and ends the rest with UNAVAILABLE.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from nanoinfer.v1 import generation_pb2 as pb
from prometheus_client import CollectorRegistry

from nanoinfer_common import errors, names, tasks, telemetry
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.errors import StartError
from nanoinfer_common.interceptors import REFUSAL_RETRY_SECONDS, RpcInterceptor
from nanoinfer_common.logs import (
    LOST_ENTRIES,
    configure_logging,
    log_what_would_be_printed,
    open_standard_streams,
)
from nanoinfer_common.metrics import MetricsServer
from nanoinfer_common.status import ServiceStatus
from nanoinfer_common.variables import unknown_variables

__all__ = ["RunningServer", "Service", "ServiceStatus", "StartError", "running", "serve"]

MAX_CONCURRENT_STREAMS: Final = 1000
# Clients may ping every 10 s, with calls or without; half of it allows for pings that bunch up on
# their way. More than two that come sooner end the connection (gRPC's own `max_ping_strikes`).
MIN_PING_INTERVAL_MILLISECONDS: Final = 5_000
CONNECTION_AGE_GRACE_SECONDS: Final = 3600
# A connection that does not speak HTTP/2 by then is closed; gRPC's own limit is two minutes.
HANDSHAKE_MILLISECONDS: Final = 20_000
# Requests that arrive in this time before the connections are sent away get UNAVAILABLE just after,
# so that callers repeat them on a new connection. gRPC's own shutdown would answer CANCELLED to
# those that it has not handed over.
SEND_AWAY_SECONDS: Final = 0.2
# What is left after a drain gets this long to take its status home.
ABORT_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 3.0
POLL_SECONDS: Final = 0.02

log = structlog.get_logger(__name__)


class Service(Protocol):
    """What a service brings; everything else is the server's."""

    name: str  # `nanoinfer-engine`: in logs, traces and as the errors' domain
    full_name: str  # `nanoinfer.v1.EngineService`: in health and reflection
    registry: CollectorRegistry

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the handlers."""

    async def start(self) -> None:
        """Gets ready. The server reports SERVING once it returns, or what the service itself set
        meanwhile, such as STALLED while others are missing. Cancelled by a shutdown.

        StartError: it cannot, and the message alone tells why.
        """

    async def drain(self, seconds: float) -> None:
        """Finishes admitted work, at most this long; new requests are already refused."""

    async def stop(self) -> None:
        """Gives everything back within 2 s. Called once, also after a start that failed."""


ServiceFactory = Callable[[ServiceStatus], Service]


@dataclass(frozen=True)
class RunningServer:
    """A server that is listening."""

    address: str
    port: int
    metrics_port: int | None
    status: ServiceStatus


def serve(service_factory: ServiceFactory, settings: ServiceSettings) -> int:
    """Runs the service until SIGTERM or SIGINT, drains, and returns the exit code.

    0 after a drain, 1 after a failure. A second signal ends the process at once. Must be called
    from the main thread, last thing in the process.
    """
    open_standard_streams()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_main(service_factory, settings))


@contextlib.asynccontextmanager
async def running(
    service_factory: ServiceFactory, settings: ServiceSettings
) -> AsyncIterator[RunningServer]:
    """Runs the service in this event loop, ready on entry and drained on exit.

    Logging, tracing and signals stay the caller's. StartError where the port is taken.
    """
    server = _Server(service_factory, settings)
    try:
        handle = await server.listen()
        await server.start()
        yield handle
        await server.drain()
    finally:
        await server.close()


async def _main(service_factory: ServiceFactory, settings: ServiceSettings) -> int:
    configure_logging("nanoinfer", settings.log_level, settings.log_format)
    log_what_would_be_printed()
    signals = _Signals()
    try:
        server = _Server(service_factory, settings)
        configure_logging(server.service.name, settings.log_level, settings.log_format)
        for description in unknown_variables(os.environ):
            log.warning("unknown variable", variable=description)
        flush = telemetry.configure_tracing(server.service.name, use_proxy=settings.trace_proxy)
    except StartError as error:
        log.error("cannot start", error=str(error))
        return 1
    await _run(server, signals)
    closing = tasks.start("close the server", server.close())
    await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
    code = 0 if server.status.failure is None else 1
    interrupted = signals.second.is_set() or not server.loaded or not closing.done()
    if not signals.second.is_set():
        await asyncio.to_thread(flush)
    log.info("stopped", exit_code=code)
    if interrupted:
        # A thread in the middle of loading cannot be interrupted and would hold the exit up.
        logging.shutdown()
        os._exit(code)
    return code


async def _run(server: "_Server", signals: "_Signals") -> None:
    failed = server.status.failed
    try:
        await server.listen()
        await _first(server.start(), signals.first.wait(), failed.wait())
        await _first(signals.first.wait(), failed.wait())
        if server.loaded and server.status.failure is None:
            await _first(server.drain(), signals.second.wait())
    except Exception as error:
        server.status.fail(error)


class _Signals:
    """SIGTERM and SIGINT: the first asks for a drain, the second for the end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


class _Server:
    def __init__(self, service_factory: ServiceFactory, settings: ServiceSettings) -> None:
        self.status = ServiceStatus()
        self.service = service_factory(self.status)
        self.loaded = False
        self._settings = settings
        self._calls = RpcInterceptor(self.service.name, settings, self.status)
        self._metrics: MetricsServer | None = None
        self._sending_away: asyncio.Task[None] | None = None
        self._grpc = grpc.aio.server(interceptors=[self._calls], options=_options(settings))

    async def listen(self) -> RunningServer:
        """Opens the ports; health answers from here on. StartError where that fails."""
        settings, service = self._settings, self.service
        # The stubs type the synchronous servicer alone.
        servicer = cast(Any, health).aio.HealthServicer()
        await self.status.bind(service.name, service.full_name, servicer)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._grpc)
        service.add_to(self._grpc)
        if settings.reflection:
            served = (service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(served, self._grpc)
        wanted = _join(settings.host, settings.port)
        try:
            port = self._grpc.add_insecure_port(wanted)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {wanted}: {_why_not(settings)}") from error
        self._open_metrics()
        await self._grpc.start()
        address = _join(settings.host, port)
        metrics_port = self._metrics.port if self._metrics else None
        log.info(f"listening on {address}", metrics_port=metrics_port)
        if settings.port_file is not None:
            _write_port_file(settings.port_file, address)
        return RunningServer(address, port, metrics_port, self.status)

    async def start(self) -> None:
        """Gets the service ready and reports it, unless the service said otherwise meanwhile."""
        await self.service.start()
        self.loaded = True
        if self.status.state == pb.SERVER_STATE_LOADING:
            self.status.set_serving()
        await self.status.publish()

    async def drain(self) -> None:
        """Leaves: clients notice, new work is refused, admitted work finishes in the time given."""
        settings = self._settings
        await self.status.leave()
        await asyncio.sleep(settings.drain_delay_seconds)
        self._calls.may_refuse.clear()
        self.status.set_draining()
        self._sending_away = tasks.start("send clients away", self._send_away())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.drain_seconds):
                await self.service.drain(settings.drain_seconds)
                while self._calls.num_requests():
                    await asyncio.sleep(POLL_SECONDS)

    async def _send_away(self) -> None:
        """Closes the port and every connection for new calls; those under way stay.

        Otherwise a client behind a virtual address would stay on its connection for all the drain.
        """
        await asyncio.sleep(SEND_AWAY_SECONDS)
        grace = self._settings.drain_seconds + CLOSE_SECONDS
        async with asyncio.TaskGroup() as group:
            group.create_task(self._grpc.stop(grace))
            await asyncio.sleep(POLL_SECONDS)
            self._calls.may_refuse.set()

    async def close(self) -> None:
        """Ends what is left with UNAVAILABLE and closes everything."""
        self.status.set_draining()
        error = errors.unavailable(names.SHUTTING_DOWN, "shutting down", REFUSAL_RETRY_SECONDS)
        self._calls.may_refuse.set()
        self._calls.interrupt_all(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                while self._calls.running:
                    await asyncio.sleep(POLL_SECONDS)
        if self._sending_away is not None:
            self._sending_away.cancel()
        await self._grpc.stop(0)
        await self.service.stop()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)

    def _open_metrics(self) -> None:
        port, host = self._settings.metrics_port, self._settings.host
        if port is None:
            return
        self.service.registry.register(telemetry.DROPPED_SPANS)
        self.service.registry.register(LOST_ENTRIES)
        self.service.registry.register(self._calls.finished)
        try:
            self._metrics = MetricsServer(self.service.registry, host, port)
        except OSError as error:
            message = f"cannot serve metrics on {_join(host, port)}: {error}"
            raise StartError(message) from error


def _why_not(settings: ServiceSettings) -> str:
    """Why the port cannot be opened, which gRPC tells in a line of its own alone."""
    try:
        infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in infos:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return str(error.strerror or error)
    return "is the port in use?"


def _write_port_file(path: Path, address: str) -> None:
    # Renamed into place, so that a reader never sees half a line.
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(f"listening on {address}\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StartError(f"cannot write {path}: {error}") from error


def _options(settings: ServiceSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A stream that is not read holds 64 KiB; gRPC would widen its window to megabytes.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MILLISECONDS),
        ("grpc.keepalive_permit_without_calls", 1),
        # Without this a second process would share the port and take half the calls.
        ("grpc.so_reuseport", 0),
    ]
    if settings.max_connection_age_seconds is not None:
        age = int(settings.max_connection_age_seconds * 1000)
        options.append(("grpc.max_connection_age_ms", age))
        options.append(("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_SECONDS * 1000))
    options.append(("grpc.server_handshake_timeout_ms", HANDSHAKE_MILLISECONDS))
    if settings.max_connection_idle_seconds is not None:
        idle = int(settings.max_connection_idle_seconds * 1000)
        options.append(("grpc.max_connection_idle_ms", idle))
    return options


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Runs all until one is done and cancels the others. An error of those done is raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending, timeout=ABORT_SECONDS)
    for task in done:
        task.result()


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
