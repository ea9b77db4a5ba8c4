"""Number of CPUs that this process may use: affinity and the quota of its control group."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

_LOG = logging.getLogger(__name__)


def usable_cpus(
    mounts: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Whole CPUs, at least 1: what affinity allows, and no more than the quota pays for.

    A fraction is rounded down. Threads that wait for one another at the end of every operation
    would all be halted, for most of each period, where one of them exceeds the quota.
    """
    return max(math.floor(min(len(os.sched_getaffinity(0)), _quota(mounts, membership))), 1)


def _quota(mounts: Path, membership: Path) -> float:
    """CPUs of the tightest quota of the process's groups and their parents; inf without one."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux, or no /proc
        return math.inf
    quota = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            quota = min([quota, *_version_2(mounts, path)])
        elif "cpu" in controllers.split(","):
            quota = min([quota, *_version_1(mounts / controllers, path)])
            quota = min([quota, *_version_1(mounts / "cpu", path)])
    return quota


def _version_2(mount: Path, path: str) -> Iterator[float]:
    for group in _with_parents(mount, path):
        fields = _read(group / "cpu.max").split()
        if len(fields) == 2 and fields[0] != "max":
            yield int(fields[0]) / int(fields[1])


def _version_1(mount: Path, path: str) -> Iterator[float]:
    for group in _with_parents(mount, path):
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            yield int(quota) / int(period)


def _with_parents(mount: Path, path: str) -> Iterator[Path]:
    """The group's directory and those above it.

    In a container the path may be the host's while the mount begins at the container's own group:
    then only the mount itself is there.
    """
    group = mount / path.lstrip("/")
    yield group
    while group != mount and group != group.parent:
        group = group.parent
        yield group


def _read(file: Path) -> str:
    """The content, or nothing where the group has no such file."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        _LOG.warning("%s cannot be read, so no quota is known from it: %s", file, error)
        return ""
