"""Service processes on this machine: start, readiness, last words, end.

`nanoinfer up`, the benchmarks and the tests start services through this module.
"""

import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nanoinfer import health
from nanoinfer.cli.console import CommandError

POLL_SECONDS = 0.05
CHECK_SECONDS = 1.0
NUM_SHOWN_LINES = 20
# listened on, they mean every address; this machine's own is the one to call
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


class ServiceProcess:
    """One service's process, leader of a group of its own.

    Its log goes to the file `log`, else line by line to `show`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port_file: Path,
        environment: Mapping[str, str],
        *,
        log: Path | None = None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Starts `command`, a service that takes `--port-file`."""
        self.name, self.log = name, log
        self.address = ""  # until it listens
        self.is_ready = False
        self._port_file, self._show = port_file, show
        self._lines: deque[str] = deque(maxlen=NUM_SHOWN_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        with nullcontext(subprocess.PIPE) if log is None else log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--port-file", str(port_file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                process_group=0,
                text=True,
                errors="replace",
            )
        if log is None:
            self._reader.start()

    def _read(self) -> None:
        output: Any = self.process.stdout
        with output:
            for line in output:
                self._lines.append(line.rstrip("\n"))
                if self._show is not None:
                    self._show(self._lines[-1])

    def look(self) -> None:
        """Notes the address once the service listens, and whether it is ready."""
        text = self._port_file.read_text() if self._port_file.exists() else ""
        if not self.address and text.endswith("\n"):
            self.address = callable_address(text.split()[-1])
        if self.address and not self.is_ready:
            status = health.check(self.address, health.READINESS, CHECK_SECONDS)
            self.is_ready = status == "SERVING"

    def check(self) -> None:
        """Raises CommandError with the last log lines where the process has ended."""
        if (said := self.last_words()) is not None:
            raise CommandError(said)

    def last_words(self) -> str | None:
        """The exit code of the process and its last log lines; None while it runs."""
        if (code := self.process.poll()) is None:
            return None
        return f"the {self.name} ended with exit code {code}:{self.tail()}"

    def tail(self) -> str:
        """The last lines of the log, each after a line break."""
        lines = self._lines
        if self.log is not None:
            lines.extend(self.log.read_text(errors="replace").splitlines())
        elif self.process.poll() is not None:
            self._reader.join(1.0)
        return "".join(f"\n  {line}" for line in lines)

    def await_start(self, seconds: float, *, ready: bool = True) -> None:
        """Waits until the service is ready, or only listens.

        Raises CommandError with the last log lines where it ends or takes longer.
        """
        end = time.monotonic() + seconds
        while not (self.is_ready if ready else self.address):
            self.check()
            if time.monotonic() > end:
                raise CommandError(f"the {self.name} did not start in {seconds:g} s:{self.tail()}")
            time.sleep(POLL_SECONDS)
            self.look()

    def await_end(self, end: float, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Waits for the process's end; kills it at `end`, a monotonic time, or in a hurry."""
        while self.process.poll() is None:
            if time.monotonic() > end or is_hurried():
                self.process.kill()
            time.sleep(POLL_SECONDS)
        if self.log is None:
            self._reader.join(1.0)

    def stop(self, seconds: float) -> None:
        """Asks the process to end; kills it after `seconds`."""
        self.process.terminate()
        self.await_end(time.monotonic() + seconds)


def callable_address(address: str) -> str:
    """An address that can be called, where one that is listened on stands for all."""
    host, _, port = address.rpartition(":")
    return f"{_EVERYWHERE.get(host, host)}:{port}"
