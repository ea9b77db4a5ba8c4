"""Tensors of the host on their way to a CUDA device, through two pinned buffers.

One is filled, by all threads, while the other is copied: reading a file's pages and the bus then
take the time of the slower one, and no more memory than the buffers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFER_BYTES = 64 << 20


class Staging:
    """Copies one tensor after another."""

    def __init__(self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES) -> None:
        """On a device other than CUDA there is nothing to pin, nor to wait for."""
        self._is_cuda = device.type == "cuda"
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(2)
        ]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Fill `target` from `source` of the same shape, converted to its dtype.

        Returns before the device has copied the last part, which its stream does in order.
        """
        if source.device.type != "cpu" or not (source.is_contiguous() and target.is_contiguous()):
            target.copy_(source)
            return
        count = len(self._buffers[0]) // source.element_size()
        parts, places = (torch.split(each.view(-1), count) for each in (source, target))
        for part, place in zip(parts, places, strict=True):
            self._copy_part(part, place)

    def _copy_part(self, part: Tensor, place: Tensor) -> None:
        index, self._next = self._next, 1 - self._next
        if (event := self._copied[index]) is not None:
            event.synchronize()
        staged = self._buffers[index].view(part.dtype)[: len(part)].copy_(part)
        place.copy_(staged, non_blocking=True)
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[index] = event
