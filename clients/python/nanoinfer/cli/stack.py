"""Runs tokenizer, engine and gateway as processes on loopback, spans collected in this one.

The tokenizer and the engine start together; the gateway follows once their ports are known. Each
process leads its own group, so that Ctrl-C reaches this program alone and the gateway, drained
first, never sees its upstreams go. On Linux they end when this process does, however that happens.
"""

import ipaddress
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import typer

from nanoinfer.cli.arguments import Ports, StackSettings
from nanoinfer.cli.collector import Collector
from nanoinfer.cli.console import CommandError, Progress, note, show
from nanoinfer.cli.environment import exports_elsewhere, service_environment, unused_variables
from nanoinfer.cli.processes import POLL_SECONDS, ServiceProcess
from nanoinfer.cli.state import Running, published

STOP_SECONDS = 40.0  # longer than the services' own drain
REFUSAL_SECONDS = 10.0  # the engine, which knows the model best, takes longest to look at it
TERMINATED = 143
SERVICES = ("gateway", "tokenizer", "engine")
LOOPBACK = "127.0.0.1"
# asks Linux to end this process with its parent (prctl PR_SET_PDEATHSIG), then becomes the service
_TIED = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGTERM));"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Interrupts:
    """SIGINT, SIGTERM, SIGHUP, counted; they raise KeyboardInterrupt inside `raising` alone.

    A `with` block that SIGTERM interrupts ends with exit code 143 instead of 130.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._raising = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Lets a signal end the block; one that came before ends it at once."""
        self._raising = True
        try:
            self.check()
            yield
        finally:
            self._raising = False

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal has come."""
        if self.received:
            raise KeyboardInterrupt

    def _arrived(self, number: int, _frame: object) -> None:
        self.received.append(number)
        if self._raising:
            self._raising = False
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self.received[:1] == [signal.SIGTERM]:
            raise typer.Exit(TERMINATED)


class Stack:
    """The three services, ready inside the `with` block and gone after it.

    Every span comes to this process; with `keep_export`, only where the environment sends them
    nowhere else, and as it has them sampled. CommandError: a port is taken, a service ended or was
    not ready in time. KeyboardInterrupt: a signal came first.
    """

    running: Running

    def __init__(
        self,
        settings: StackSettings,
        interrupts: Interrupts,
        ports: Ports,
        *,
        keep_export: bool = False,
    ) -> None:
        self._settings = settings
        self._interrupts = interrupts
        self._ports = ports
        self._keep_export = keep_export
        self._children: dict[str, ServiceProcess] = {}
        self._collector: Collector | None = None
        for host, port in _wanted(ports):
            _check_free(host, port)
        if not (keep_export and exports_elsewhere()):
            try:
                self._collector = Collector(ports.collector_port)
            except RuntimeError as error:
                port = ports.collector_port
                raise CommandError(f"cannot listen on port {port}: is it in use?") from error
        if unused := list(unused_variables(self._collector is not None, not keep_export)):
            note(f"not used here: {', '.join(unused)}")

    def check(self) -> None:
        """Raises CommandError where a service has ended, KeyboardInterrupt where a signal came."""
        self._interrupts.check()
        for child in self._children.values():
            child.check()

    def __enter__(self) -> Self:
        if self._collector is not None:
            self._collector.__enter__()
        try:
            with Progress("starting") as progress, tempfile.TemporaryDirectory() as directory:
                self._start(Path(directory), progress)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with Progress("stopping"):
            for names in (("gateway",), ("engine", "tokenizer")):
                children = [self._children[name] for name in names if name in self._children]
                for child in children:
                    child.process.terminate()
                end = time.monotonic() + STOP_SECONDS
                for child in children:
                    child.await_end(end, lambda: len(self._interrupts.received) > 1)
        if self._collector is not None:
            self._collector.__exit__()

    def _start(self, directory: Path, progress: Progress) -> None:
        settings = self._settings
        end = time.monotonic() + settings.start_timeout
        model = ["--model", str(settings.model)]
        if settings.tokenizer is not None:
            model += ["--tokenizer", str(settings.tokenizer)]
        threads = [] if settings.threads is None else ["--threads", str(settings.threads)]
        self._spawn("tokenizer", directory, model)
        self._spawn("engine", directory, [*model, *threads])
        while not all(child.is_ready for child in self._children.values()):
            self._tick(end, progress)
            children = self._children.values()
            for child in children:
                child.look()
            if "gateway" not in self._children and all(child.address for child in children):
                upstreams = [w for child in children for w in (f"--{child.name}", child.address)]
                self._spawn("gateway", directory, upstreams)
        collector = None if self._collector is None else self._collector.address
        self.running = Running(self._children["gateway"].address, collector, os.getpid())

    def _refusals(self) -> str:
        """Last words of the services that have ended, the engine's first: it is waited for a while.

        A model that is none lets the tokenizer fail at once, for a reason that misleads.
        """
        engine = self._children["engine"]
        end = time.monotonic() + REFUSAL_SECONDS
        while not engine.is_ready and engine.last_words() is None and time.monotonic() < end:
            self._interrupts.check()
            time.sleep(POLL_SECONDS)
            engine.look()
        words = [child.last_words() for child in reversed(self._children.values())]
        return "\n".join(each for each in words if each is not None)

    def _tick(self, end: float, progress: Progress) -> None:
        try:
            self.check()
        except CommandError as error:
            raise CommandError(self._refusals()) from error
        children = self._children.values()
        states = [f"{each.name} {'ready' if each.is_ready else 'loading'}" for each in children]
        progress.say(f"starting: {', '.join(states)}")
        if time.monotonic() > end:
            seconds = self._settings.start_timeout
            raise CommandError(f"not ready within {seconds:g} s: {', '.join(states)}")
        time.sleep(POLL_SECONDS)

    def _spawn(self, name: str, directory: Path, flags: Sequence[str]) -> None:
        settings, ports = self._settings, self._ports
        command = (settings.commands or {}).get(name, (sys.executable, "-m", f"nanoinfer_{name}"))
        port = ports.port if name == "gateway" else 0
        metrics = "none"
        if ports.metrics_port is not None:
            metrics = str(ports.metrics_port and ports.metrics_port + SERVICES.index(name))
        host = ports.host if name == "gateway" else LOOPBACK
        common = ["--host", host, "--port", str(port), "--metrics-port", metrics]
        common += ["--log-level", settings.log_level or "warning"]
        if "NANOINFER_LOG_FORMAT" not in os.environ:
            common += ["--log-format", "console"]
        if _is_loopback(host) and "NANOINFER_TRUST_INCOMING_TRACE" not in os.environ:
            common += ["--trust-incoming-trace"]  # all callers are on this machine
        tie = (sys.executable, "-ISc", _TIED) if sys.platform == "linux" else ()
        whole = [*tie, *command, *common, *flags]
        show = None if settings.log_level is None else partial(_forward, name)
        self._children[name] = ServiceProcess(
            name, whole, directory / name, self._environment(), show=show
        )

    def _environment(self) -> dict[str, str]:
        collector = None if self._collector is None else self._collector.address
        return service_environment(collector, complete=not self._keep_export)


def _forward(name: str, line: str) -> None:
    """Shows a log line; a standard error that nobody takes must not fill the service's pipe."""
    with suppress(OSError, ValueError):
        note(f"{name} | {line}")


def _wanted(ports: Ports) -> Iterator[tuple[str, int]]:
    """The addresses that the flags ask for, the collector's apart.

    The host is looked at with a free port, too: it may be none of this machine's.
    """
    yield ports.host, ports.port
    if ports.metrics_port:
        for number, name in enumerate(SERVICES):
            host = ports.host if name == "gateway" else LOOPBACK
            yield host, ports.metrics_port + number


def _check_free(host: str, port: int) -> None:
    """Raises CommandError where nothing can listen, before a model is loaded in vain."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(f"cannot listen on port {port} of {host}: {reason}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run_until_told(settings: StackSettings, ports: Ports, *, as_json: bool) -> None:
    """Runs a stack until a signal comes. CommandError where one of its services ends."""
    with Interrupts() as interrupts, suppress(KeyboardInterrupt), ExitStack() as exits:
        stack = exits.enter_context(Stack(settings, interrupts, ports, keep_export=True))
        running = stack.running
        exits.enter_context(published(running))
        spans = running.collector or "where OTEL_... says"
        text = f"nanoinfer is ready at {running.target} (spans at {spans})"
        show(text, {"ready": True, **asdict(running)}, as_json)
        while True:
            stack.check()
            time.sleep(POLL_SECONDS)
