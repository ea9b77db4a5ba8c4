"""Who owns which block of the KV cache: a free list with an owner written beside every block.

Knows nothing of requests, tokens or tensors. Every operation is O(1) per block.
"""

from __future__ import annotations

from collections.abc import Sequence


class BlockError(RuntimeError):
    """The books of the pool do not add up: a bug in the caller, never a state of load."""


class BlockPool:
    """Hands out block ids in [0, num_blocks) and takes them back from their owner alone.

    Invariant: every block is either in the free list or has exactly one owner.
    """

    def __init__(self, num_blocks: int) -> None:
        """Start with all `num_blocks` blocks free; lower ids are handed out first."""
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, got {num_blocks}")
        self._owners: list[object | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        """All blocks, free and owned."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still hand out."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that are owned, 0 to 1."""
        return 1 - len(self._free) / len(self._owners)

    def allocate(self, count: int, owner: object) -> list[int]:
        """Give `count` blocks to `owner`; raises BlockError if there are not that many."""
        if count > len(self._free):
            raise BlockError(f"{count} blocks asked for, {len(self._free)} free")
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._owners[block_id] = owner
        return block_ids

    def free(self, block_ids: Sequence[int], owner: object) -> None:
        """Take `block_ids` back; raises BlockError at the first that is not `owner`'s."""
        for block_id in block_ids:
            if self._owners[block_id] is not owner:
                raise BlockError(f"block {block_id} is not owned by the one who frees it")
            self._owners[block_id] = None
            self._free.append(block_id)
