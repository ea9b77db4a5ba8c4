"""Blocks of the KV cache: the pool, the blocks of each request, and the prefix cache.

The pool (`BlockPool`) counts the users of each block, and finds kept blocks by their content.

    free ──allocate──▶ in use (1 or more users) ──free──▶ kept (has a name, no user) ─┐
      ▲                     ▲          │ no name              │ share                 │ evicted,
      └─────────────────────┼──────────┘◀─────────────────────┼───────────────────────┘ oldest first
                            └─────────────────────────────────┘

It knows nothing of requests, tokens or tensors, and every operation is O(1) per block.

`BlockTables` gives blocks to requests. A full block is named by a chained SHA-256 over the
request's salt and every token up to the block's end, so equal names mean equal context. Names are
made here and never taken from a client. A block is named when the step that fills it is planned:
steps run in order, and within one step the model stores all keys and values of a layer before
anybody reads them, so later rows of the same step may already share it. Shared blocks are full and
hence never written again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

from nanoinfer_engine.core.request import Request


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


class BlockTables:
    """Fills, shares and empties the `block_ids` of requests."""

    def __init__(self, num_blocks: int, block_size: int, caches_prefixes: bool) -> None:
        """Own `num_blocks` blocks of `block_size` tokens; keep full ones or none after use."""
        self._pool = BlockPool(num_blocks)
        self._block_size = block_size
        self._caches_prefixes = caches_prefixes

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, those kept for their content included."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that requests use, 0 to 1."""
        return self._pool.usage

    def num_needed(self, request: Request) -> int:
        """Free blocks that `start` would take: all but those that others use already."""
        cached = self._find(request)
        num_blocks = -(-request.num_tokens // self._block_size)
        return num_blocks - len(cached) + self._pool.num_kept(cached)

    def start(self, request: Request) -> None:
        """Give blocks for all known tokens, cached ones where there are; sets the computed count.

        The last known token is never taken from the cache, because its logits are wanted.
        """
        cached = self._find(request)
        self._pool.share(cached)
        request.block_ids.extend(cached)
        request.num_computed_tokens = len(cached) * self._block_size
        if self._reads_cache(request) and request.times.scheduled is None:
            request.num_cached_tokens = request.num_computed_tokens
        self.grow(request, request.num_tokens)

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """Blocks that the request lacks for `num_tokens` tokens."""
        num_missing = -(-num_tokens // self._block_size) - len(request.block_ids)
        return num_missing if num_missing > 0 else 0

    def grow(self, request: Request, num_tokens: int) -> None:
        """Give the blocks that are missing."""
        request.block_ids.extend(self._pool.allocate(self.num_missing(request, num_tokens)))
        request.max_blocks = max(request.max_blocks, len(request.block_ids))

    def remember(self, request: Request, stop: int) -> None:
        """Name the blocks that a planned step fills by computing the tokens up to `stop`."""
        if not self._caches_prefixes:
            return
        first, num_full = request.num_computed_tokens // self._block_size, stop // self._block_size
        if first == num_full:
            return
        self._extend_names(request, num_full)
        for index in range(first, num_full):
            self._pool.name(request.block_ids[index], request.block_names[index])

    def release(self, request: Request) -> None:
        """Take the request's blocks; what has a name can still be found."""
        self._pool.free(request.block_ids)
        del request.block_ids[:]

    def forget(self, request: Request) -> None:
        """Let nobody find the request's blocks: what they hold may be wrong."""
        self._pool.forget(request.block_ids)

    def _reads_cache(self, request: Request) -> bool:
        return self._caches_prefixes and not request.scores_prompt

    def _find(self, request: Request) -> list[int]:
        if not self._reads_cache(request):
            return []
        num_blocks = (request.num_tokens - 1) // self._block_size
        self._extend_names(request, num_blocks)
        return self._pool.find(request.block_names[:num_blocks])

    def _extend_names(self, request: Request, num_blocks: int) -> None:
        names = request.block_names
        name = names[-1] if names else _salt(request)
        for index in range(len(names), num_blocks):
            start = index * self._block_size
            content = array("I", request.tokens(start, start + self._block_size))
            name = sha256(name + content.tobytes()).digest()
            names.append(name)


def _salt(request: Request) -> bytes:
    """What a request's names begin with: its own salt, else its tenant; the two never meet."""
    if request.cache_salt is not None:
        return sha256(b"salt\0" + request.cache_salt.encode()).digest()
    return sha256(b"tenant\0" + request.tenant.encode()).digest()
