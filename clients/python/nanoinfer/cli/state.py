"""Lets `trace` find a running `up`: a small file in the user's own runtime or cache directory."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nanoinfer import health
from nanoinfer.cli import console

CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class Running:
    """A running stack: the gateway's address, the span collector's, the process that holds both."""

    target: str
    collector: str
    pid: int


def directory() -> Path:
    """Where the files are."""
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "nanoinfer"


@contextmanager
def published(running: Running) -> Iterator[None]:
    """Leaves the file while the block runs. Without a writable place there is none."""
    path = directory() / f"up-{running.pid}.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(running)))
    except OSError as error:
        console.note(f"`nanoinfer trace` will not find this stack by itself: {error}")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def find(target: str | None = None) -> Running | None:
    """The newest stack of this user that answers, or the one at `target`."""
    wanted = None if target is None else target.replace("localhost", "127.0.0.1")
    for path in sorted(directory().glob("up-*.json"), reverse=True, key=_modified):
        try:
            running = Running(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # removed meanwhile, or not ours
        if wanted in (None, running.target) and _answers(running.target):
            return running
    return None


def _answers(target: str) -> bool:
    return health.check(target, health.READINESS, CHECK_SECONDS) == "SERVING"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
