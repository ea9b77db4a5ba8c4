"""The block pool's books: every block is free, kept for its content, or in use."""

import pytest
from nanoinfer_engine.core.blocks import BlockError, BlockPool


def kept(num_blocks: int, *names: bytes) -> BlockPool:
    """A pool with one unused, named block for each name, the first freed first."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(len(names))
    for block_id, name in zip(blocks, names, strict=True):
        pool.name(block_id, name)
        pool.free([block_id])
    return pool


def test_allocates_every_block_once() -> None:
    pool = BlockPool(4)
    assert pool.usage == 0
    blocks = pool.allocate(3) + pool.allocate(1)
    assert sorted(blocks) == [0, 1, 2, 3]
    assert (pool.num_free, pool.usage) == (0, 1)


def test_refuses_more_than_there_is_and_keeps_the_rest() -> None:
    pool = BlockPool(2)
    with pytest.raises(BlockError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_block_is_freed_once_for_each_user() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 2
    with pytest.raises(BlockError, match="not in use"):
        pool.free(blocks)
    assert pool.num_free == 2


def test_what_is_free_can_be_neither_shared_nor_named() -> None:
    pool = BlockPool(2)
    with pytest.raises(BlockError, match="nothing to share"):
        pool.share([0])
    with pytest.raises(BlockError, match="not in use"):
        pool.name(0, b"a")


def test_a_named_block_outlives_its_user_and_is_not_counted_as_in_use() -> None:
    pool = kept(2, b"a")
    assert (pool.num_free, pool.usage) == (2, 0)
    found = pool.find([b"a"])
    assert pool.num_kept(found) == 1
    pool.share(found)
    assert (pool.num_free, pool.num_kept(found)) == (1, 0)


def test_find_stops_at_the_first_gap() -> None:
    pool = kept(4, b"a", b"b", b"c")
    assert len(pool.find([b"a", b"b"])) == 2
    assert len(pool.find([b"a", b"x", b"c"])) == 1
    assert pool.find([b"x", b"a"]) == []


def test_the_least_recently_used_is_evicted_first_and_after_free_blocks() -> None:
    pool = kept(4, b"a", b"b", b"c")
    found = pool.find([b"a"])
    pool.share(found)
    pool.free(found)  # a is now the newest
    pool.allocate(1)  # the one that was free
    assert len(pool.find([b"a", b"b", b"c"])) == 3
    pool.allocate(1)
    assert pool.find([b"b"]) == []
    pool.allocate(1)
    assert pool.find([b"c"]) == []
    assert pool.find([b"a"]) == found


def test_a_chain_is_evicted_from_its_end() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block_id, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.name(block_id, name)
    pool.free(blocks)
    pool.allocate(1)
    assert pool.find([b"a", b"b", b"c"]) == blocks[:2]


def test_of_two_alike_the_first_keeps_the_name() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.name(first, b"a")
    pool.name(second, b"a")
    pool.name(first, b"other")  # nor is a block renamed
    assert pool.find([b"a"]) == [first]
    assert pool.find([b"other"]) == []
    pool.free([first, second])
    assert pool.num_free == 2


def test_forgotten_content_is_found_no_more() -> None:
    pool = kept(2, b"a", b"b")
    used = pool.find([b"b"])
    pool.share(used)
    pool.forget(pool.find([b"a"]) + used)
    assert pool.find([b"a"]) == pool.find([b"b"]) == []
    pool.free(used)
    assert sorted(pool.allocate(2)) == [0, 1]


def test_an_empty_pool_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)
