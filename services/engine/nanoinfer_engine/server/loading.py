"""Shows how far the weights are: a bar where somebody watches, else a log line a second."""

from __future__ import annotations

import sys
import time

import structlog
from tqdm import tqdm

from nanoinfer_engine.core.progress import LoadProgress, Progress

PROGRESS_SECONDS = 1.0
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt}, {rate_fmt}"

log = structlog.get_logger(__name__)


def show_loading(log_format: str) -> Progress:
    """What shows the progress of one load; a bar needs a terminal and a log for people."""
    return _Bar() if log_format == "console" and sys.stderr.isatty() else _Lines()


class _Bar:
    """Drawn on stderr from the first report to the last."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, progress: LoadProgress) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=progress.total_bytes, unit="B", unit_scale=True, bar_format=_BAR, delay=0
            )
        self._bar.set_description_str(f"weights, shard {_place(progress)}", refresh=False)
        self._bar.update(progress.num_bytes - self._bar.n)
        if progress.num_bytes == progress.total_bytes:
            self._bar.close()


class _Lines:
    """Logged once a second, and at the end."""

    def __init__(self) -> None:
        self._began = self._logged = time.monotonic()

    def __call__(self, progress: LoadProgress) -> None:
        now, done = time.monotonic(), progress.num_bytes == progress.total_bytes
        if now - self._logged < PROGRESS_SECONDS and not done:
            return
        self._logged = now
        log.info(
            "loading weights",
            percent=round(100 * progress.num_bytes / max(progress.total_bytes, 1)),
            shard=_place(progress),
            gigabytes_per_second=round(progress.num_bytes / max(now - self._began, 1e-3) / 1e9, 2),
        )


def _place(progress: LoadProgress) -> str:
    return f"{progress.shard}/{progress.num_shards}"
