"""Which blocks each request holds, and the prefix cache: full blocks that outlive their request.

A full block is named by a chained SHA-256 over the request's salt and every token up to the
block's end, so equal names mean equal context. Names are made here and never taken from a client.
A block is named when the step that fills it is planned: steps run in order, and within one step the
model stores all keys and values of a layer before anybody reads them, so later rows of the same
step may already share it. Shared blocks are full and hence never written again.
"""

from __future__ import annotations

from array import array
from hashlib import sha256

from nanoinfer_engine.core.blocks import BlockPool
from nanoinfer_engine.core.request import Request


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
