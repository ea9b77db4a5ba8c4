"""Runs tokenizer, engine and gateway as processes on loopback, spans collected in this one.

The tokenizer and the engine start together; the gateway follows once their ports are known. Each
process leads its own group, so that Ctrl-C reaches this program alone and the gateway, drained
first, never sees its upstreams go.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import typer

from nanoinfer import health
from nanoinfer.cli.collector import Collector
from nanoinfer.cli.console import TERMINATED, CommandError, Progress, note, write, write_json
from nanoinfer.cli.state import Running, published

POLL_SECONDS = 0.05
CHECK_SECONDS = 1.0
STOP_SECONDS = 40.0  # longer than the services' own drain
NUM_LOG_LINES = 200
NUM_SHOWN_LINES = 20
COMMANDS: Mapping[str, Sequence[str]] = {
    name: (sys.executable, "-m", f"nanoinfer_{name}") for name in ("tokenizer", "engine", "gateway")
}


@dataclass(frozen=True)
class StackSettings:
    """What to run. Port 0 is a free one; `metrics_port` is the gateway's, the next two follow."""

    model: Path
    tokenizer: Path | None = None
    threads: int | None = None
    port: int = 0
    collector_port: int = 0
    metrics_port: int | None = None
    start_timeout: float = 300.0
    log_level: str = "warning"
    forward_logs: bool = False
    commands: Mapping[str, Sequence[str]] = field(default_factory=lambda: COMMANDS)


class Interrupts:
    """SIGINT, SIGTERM, SIGHUP, counted; they raise KeyboardInterrupt inside `raising` alone."""

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

    @contextmanager
    def exit_code(self) -> Iterator[None]:
        """Ends with 143 instead of 130 where it was SIGTERM that interrupted the block."""
        try:
            yield
        except KeyboardInterrupt:
            if self.received[:1] == [signal.SIGTERM]:
                raise typer.Exit(TERMINATED) from None
            raise

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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Child:
    """One service's process and its newest log lines."""

    def __init__(
        self, name: str, command: Sequence[str], port_file: Path, environment: Mapping[str, str],
        forward: bool,
    ) -> None:  # fmt: skip
        self.name = name
        self.ready = False
        self._port_file = port_file
        self._lines: deque[str] = deque(maxlen=NUM_LOG_LINES)
        self._forward = forward
        self.process = subprocess.Popen(
            [*command, "--port-file", str(port_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            process_group=0,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self.process.stdout is None:
            return
        with self.process.stdout as output:
            for line in output:
                self._lines.append(line.rstrip("\n"))
                if self._forward:
                    note(f"{self.name} | {self._lines[-1]}")

    def address(self) -> str | None:
        """Where it listens; None until it does."""
        text = self._port_file.read_text() if self._port_file.exists() else ""
        return text.split()[-1] if text.endswith("\n") else None

    def check(self) -> None:
        """Raises CommandError with the last log lines where the process has ended."""
        code = self.process.poll()
        if code is None:
            return
        self._reader.join(1.0)
        tail = "".join(f"\n  {line}" for line in list(self._lines)[-NUM_SHOWN_LINES:])
        raise CommandError(f"the {self.name} ended with exit code {code}:{tail}")

    def terminate(self) -> None:
        """Asks it to drain and end."""
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self, end: float, interrupts: Interrupts) -> None:
        """Waits for its end; kills it at `end` or at a second signal."""
        while self.process.poll() is None:
            if time.monotonic() > end or len(interrupts.received) > 1:
                self.process.kill()
            time.sleep(POLL_SECONDS)
        self._reader.join(1.0)


class Stack:
    """The three services, ready inside the `with` block and gone after it.

    CommandError: a service ended or was not ready in time. KeyboardInterrupt: a signal came first.
    """

    def __init__(self, settings: StackSettings, interrupts: Interrupts) -> None:
        self.address = ""
        self._settings = settings
        self._interrupts = interrupts
        self._children: dict[str, _Child] = {}
        try:
            self._collector = Collector(settings.collector_port)
        except RuntimeError as error:
            port = settings.collector_port
            raise CommandError(f"cannot listen on port {port}: is it in use?") from error
        self.collector = self._collector.address

    def check(self) -> None:
        """Raises CommandError where a service has ended, KeyboardInterrupt where a signal came."""
        self._interrupts.check()
        for child in self._children.values():
            child.check()

    def __enter__(self) -> Self:
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
                    child.terminate()
                end = time.monotonic() + STOP_SECONDS
                for child in children:
                    child.wait(end, self._interrupts)
        self._collector.__exit__()

    def _start(self, directory: Path, progress: Progress) -> None:
        end = time.monotonic() + self._settings.start_timeout
        model = ["--model", str(self._settings.model)]
        if self._settings.tokenizer is not None:
            model += ["--tokenizer", str(self._settings.tokenizer)]
        threads = self._settings.threads
        self._spawn("tokenizer", directory, model)
        self._spawn(
            "engine", directory, model + ([] if threads is None else ["--threads", str(threads)])
        )
        upstreams = []
        for name in ("tokenizer", "engine"):
            upstreams += [f"--{name}", self._address(name, end, progress)]
        self._spawn("gateway", directory, upstreams)
        self.address = self._address("gateway", end, progress)
        while waiting := [child for child in self._children.values() if not child.ready]:
            self._tick(end, progress)
            for child in waiting:
                status = health.check(child.address() or "", health.READINESS, CHECK_SECONDS)
                child.ready = status == "SERVING"

    def _address(self, name: str, end: float, progress: Progress) -> str:
        while (address := self._children[name].address()) is None:
            self._tick(end, progress)
        return address

    def _tick(self, end: float, progress: Progress) -> None:
        self.check()
        states = [f"{c.name} {'ready' if c.ready else 'loading'}" for c in self._children.values()]
        progress.say(f"starting: {', '.join(states)}")
        if time.monotonic() > end:
            seconds = self._settings.start_timeout
            raise CommandError(f"not ready within {seconds:g} s: {', '.join(states)}")
        time.sleep(POLL_SECONDS)

    def _spawn(self, name: str, directory: Path, flags: Sequence[str]) -> None:
        settings = self._settings
        order = ("gateway", "tokenizer", "engine")
        port = settings.port if name == "gateway" else 0
        metrics = "none"
        if settings.metrics_port is not None:
            metrics = str(settings.metrics_port and settings.metrics_port + order.index(name))
        common = ["--host", "127.0.0.1", "--port", str(port), "--metrics-port", metrics]
        common += ["--log-level", settings.log_level, "--log-format", "console"]
        common += ["--trust-incoming-trace"]  # all callers are on this machine
        self._children[name] = _Child(
            name,
            [*settings.commands[name], *common, *flags],
            directory / f"{name}.port",
            self._environment(),
            settings.forward_logs,
        )

    def _environment(self) -> dict[str, str]:
        """This process's, with every span going to the collector at once."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("OTEL_") or name == "OTEL_RESOURCE_ATTRIBUTES"
        }
        return kept | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.collector}",
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_TRACES_SAMPLER": "always_on",
        }


def run_until_told(settings: StackSettings, *, as_json: bool) -> None:
    """Runs a stack until a signal comes. CommandError where one of its services ends."""
    with Interrupts() as interrupts, suppress(KeyboardInterrupt), ExitStack() as exits:
        stack = exits.enter_context(Stack(settings, interrupts))
        running = Running(stack.address, stack.collector, os.getpid())
        exits.enter_context(published(running))
        if as_json:
            write_json({"ready": True, **asdict(running)})
        else:
            write(f"nanoinfer is ready at {stack.address} (spans at {stack.collector})\n")
        while True:
            stack.check()
            time.sleep(POLL_SECONDS)
