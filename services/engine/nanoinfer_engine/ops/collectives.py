"""What the processes that share a model do together: add up, gather, agree.

Each rank must make the same calls in the same order, on tensors of the same shape and dtype;
nothing here can tell that another did not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# the name since torch 2.13; the older one then warns
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Rank:
    """One of `size` processes, `index` of them; of several, each must have joined (`ranks`)."""

    index: int = 0
    size: int = 1

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; `tensor` is contiguous."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, share: Tensor, width: int) -> Tensor:
        """[rows, columns of each] → [rows, width]: the ranks' columns in order, padding cut off."""
        if self.size == 1:
            return share
        rows, columns = share.shape
        parts = share.new_empty((self.size * rows, columns))
        _gather(parts, share.contiguous())
        whole = parts.view(self.size, rows, columns).transpose(0, 1).reshape(rows, -1)
        return whole[:, :width].contiguous()

    def least(self, value: int) -> int:
        """The least of the ranks' values; waits for them all."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        least = torch.tensor(value, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)


ALONE = Rank()
"""The one rank of a model on one device."""
