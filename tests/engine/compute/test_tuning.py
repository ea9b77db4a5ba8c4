"""Device time against launching, with a device that only takes time."""

import time

import pytest
import torch
from nanoinfer_engine.ops.cuda.tuning import device_lag


@pytest.mark.parametrize(
    ("launching", "running", "least", "most"),
    [(0.05, 0.25, 3.0, 8.0), (0.05, 0.0, 1.0, 1.5)],
    ids=["the device takes longer", "the device waits for launches"],
)
def test_device_lag(
    monkeypatch: pytest.MonkeyPatch, launching: float, running: float, least: float, most: float
) -> None:
    seen: list[float] = []
    launched: list[float] = []  # and not waited for

    def synchronize() -> None:
        if launched:
            time.sleep(launched.pop())

    def launch() -> None:
        if not seen:
            time.sleep(0.2)  # compiles
        seen.append(launching)
        time.sleep(launching)
        launched.append(running)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert least < device_lag(launch) < most
    assert len(seen) == 3
