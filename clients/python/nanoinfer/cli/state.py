"""Lets `trace` find a running `up`: a small file in the user's own runtime or cache directory."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nanoinfer import health
from nanoinfer.cli import console


@dataclass(frozen=True)
class Running:
    """A running stack: the gateway's address, the span collector's, the process that holds both.

    Without a collector its spans go elsewhere.
    """

    target: str
    collector: str | None
    pid: int


def _directory() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "nanoinfer"


@contextmanager
def published(running: Running) -> Iterator[None]:
    """Leaves the file while the block runs. Without a writable place there is none."""
    path = _directory() / f"up-{running.pid}.json"
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
    found: list[tuple[float, Running]] = []
    for path in _directory().glob("up-*.json"):
        with suppress(OSError, ValueError, TypeError):  # removed meanwhile, or not ours
            found.append((path.stat().st_mtime, Running(**json.loads(path.read_text()))))
    for _, running in sorted(found, key=lambda pair: pair[0], reverse=True):
        if wanted in (None, running.target) and _answers(running):
            return running
    return None


def _answers(running: Running) -> bool:
    return health.check(running.target, health.READINESS, timeout=1.0) == "SERVING"
