"""Who uses which block of the KV cache, and which content a block can be found by.

    free ──allocate──▶ in use (1 or more users) ──free──▶ kept (has a name, no user) ─┐
      ▲                     ▲          │ no name              │ share                 │ evicted,
      └─────────────────────┼──────────┘◀─────────────────────┼───────────────────────┘ oldest first
                            └─────────────────────────────────┘

Knows nothing of requests, tokens or tensors. Every operation is O(1) per block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockError(RuntimeError):
    """The books of the pool do not add up: a bug in the caller, never a state of load."""


class BlockPool:
    """Hands out block ids in [0, num_blocks), counts their users and finds them by content.

    Invariant: every block is free, kept or in use; a name stands for one block and a block has at
    most one; kept blocks have a name.
    """

    def __init__(self, num_blocks: int) -> None:
        """Start with all `num_blocks` blocks free; lower ids are handed out first."""
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, got {num_blocks}")
        self._num_users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return len(self._num_users)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still hand out: nobody uses them."""
        return len(self._free) + len(self._kept)

    @property
    def usage(self) -> float:
        """Share of the blocks that are in use, 0 to 1; what is merely kept is not."""
        return 1 - self.num_free / self.num_blocks

    def allocate(self, count: int) -> list[int]:
        """Give `count` blocks to one user; raises BlockError if there are not that many.

        Kept blocks are given last, the least recently used first, and lose their names.
        """
        if count > self.num_free:
            raise BlockError(f"{count} blocks asked for, {self.num_free} free")
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._num_users[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one user to each of `block_ids`, which `find` gave."""
        for block_id in block_ids:
            if not self._num_users[block_id]:
                if block_id not in self._kept:
                    raise BlockError(f"block {block_id} is free and has nothing to share")
                del self._kept[block_id]
            self._num_users[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Take one user from each; raises BlockError where there is none.

        The last of `block_ids` counts as used least recently: a chain is evicted from its end.
        """
        for block_id in reversed(block_ids):
            if not self._num_users[block_id]:
                raise BlockError(f"block {block_id} is not in use")
            self._num_users[block_id] -= 1
            if self._num_users[block_id]:
                continue
            if block_id in self._names:
                self._kept[block_id] = None
            else:
                self._free.append(block_id)

    def name(self, block_id: int, name: bytes) -> None:
        """Let `find` find a block in use by its content; of two alike the first keeps the name."""
        if not self._num_users[block_id]:
            raise BlockError(f"block {block_id} is not in use")
        if block_id not in self._names and name not in self._by_name:
            self._names[block_id] = name
            self._by_name[name] = block_id

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of `names`, from the first on, that are all there."""
        found = []
        for name in names:
            block_id = self._by_name.get(name)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_kept(self, block_ids: Iterable[int]) -> int:
        """How many of `block_ids` nobody uses."""
        return sum(not self._num_users[block_id] for block_id in block_ids)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Take the names of blocks whose content may be wrong."""
        for block_id in block_ids:
            name = self._names.pop(block_id, None)
            if name is not None:
                del self._by_name[name]
            if block_id in self._kept:
                del self._kept[block_id]
                self._free.append(block_id)

    def _evict(self) -> int:
        block_id, _ = self._kept.popitem(last=False)
        del self._by_name[self._names.pop(block_id)]
        return block_id
