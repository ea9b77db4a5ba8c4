"""What device steps need of CUDA besides kernels, for where Triton's interpreter runs those.

Streams run everything at once and in order, pinned memory is memory, and a captured step is run
again where a graph would be replayed: on the same static memory, as a graph.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor


class Stream:
    """Has nothing to wait for."""

    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, _: Stream) -> None: ...

    def wait_event(self, _: Event) -> None: ...


class Event:
    """A moment."""

    def __init__(self, **_: object) -> None:
        self.record()

    def record(self, *_: object) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, *_: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.seconds - self.seconds)


class CapturedSteps:
    """Runs what a graph would replay; `replayed` are the keys."""

    def __init__(self, *_: object) -> None:
        self.replayed: list[Any] = []
        self._steps: dict[Hashable, Callable[[], Tensor]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._steps

    def capture(self, key: Hashable, run: Callable[[], Tensor]) -> bool:
        run()
        self._steps[key] = run
        return True

    def replay(self, key: Hashable) -> Tensor:
        self.replayed.append(key)
        return self._steps[key]()


def install(patch: pytest.MonkeyPatch) -> None:
    """In the place of CUDA, until `patch` is undone."""
    from nanoinfer_engine.step import device_steps

    def unpinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, pin_memory: bool = False, **more: Any) -> Tensor:
            return make(*arguments, **more)

        return made

    patch.setattr(device_steps, "CapturedSteps", CapturedSteps)
    for name in ("zeros", "empty"):
        patch.setattr(torch, name, unpinned(getattr(torch, name)))
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
