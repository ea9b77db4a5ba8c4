"""CPUs that a process may use, read from control groups as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.step import runner
from nanoinfer_engine.step.cpus import usable_cpus

from tests.engine.compute.driver import make_runner
from tests.engine.tiny_checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def _sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def count(tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    """Usable CPUs where the process is a member of these groups and the mounts hold these files."""
    mounts, listed = tmp_path / "mounts", tmp_path / "membership"
    listed.write_text(membership)
    for name, content in files.items():
        (mounts / name).parent.mkdir(parents=True, exist_ok=True)
        (mounts / name).write_text(content)
    return usable_cpus(mounts, listed)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", 16),
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("10000 10000", 1),
        ("9900000 100000", 16),
    ],
)
def test_version_2_in_a_container_whose_own_group_is_the_root(
    tmp_path: Path, limit: str, expected: int
) -> None:
    assert count(tmp_path, "0::/\n", {"cpu.max": limit + "\n"}) == expected


def test_the_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    files = {
        "pods/cpu.max": "300000 100000\n",
        "pods/one/cpu.max": "max 100000\n",
        "pods/one/engine/cpu.max": "800000 100000\n",
        "pods/two/cpu.max": "100000 100000\n",  # no group of this process
    }
    assert count(tmp_path, "0::/pods/one/engine\n", files) == 3


V1 = "4:memory:/pods/one\n3:cpu,cpuacct:/pods/one\n2:cpuset:/\n0::/\n"


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_version_1_of_the_host_and_of_a_container(tmp_path: Path, mount: str) -> None:
    group = f"{mount}/pods/one"
    assert count(tmp_path, V1, {f"{group}/cpu.cfs_quota_us": "-1\n"}) == 16
    files = {f"{group}/cpu.cfs_quota_us": "500000\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    assert count(tmp_path, V1, files) == 5
    # in a container the mount begins at its own group, while the membership has the host's path
    files = {f"{mount}/cpu.cfs_quota_us": "200000\n", f"{mount}/cpu.cfs_period_us": "100000\n"}
    contained = tmp_path / "contained"
    contained.mkdir()
    assert count(contained, V1, files) == 2


def test_affinity_counts_where_the_quota_is_wider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert count(tmp_path, "0::/\n", {"cpu.max": "600000 100000\n"}) == 2


def test_without_control_groups_affinity_counts(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path, tmp_path / "no membership") == 16
    assert count(tmp_path, "0::/\n", {}) == 16


@pytest.mark.parametrize(("asked", "expected"), [(None, 1), (2, 2)])
def test_a_runner_keeps_to_the_usable_cpus_unless_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: int | None,
    expected: int,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(runner, "usable_cpus", lambda: 1)
    caplog.set_level("INFO")
    try:
        torch.set_num_threads(3)
        make_runner(make_checkpoint("qwen3", tmp_path), num_threads=asked)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert f"a step has {expected} threads" in caplog.text
