"""The block pool's books: every block is free or has exactly one owner."""

import pytest
from nanoinfer_engine.blocks import BlockError, BlockPool


def test_allocates_every_block_once() -> None:
    pool = BlockPool(4)
    assert pool.usage == 0
    blocks = pool.allocate(3, owner="a") + pool.allocate(1, owner="b")
    assert sorted(blocks) == [0, 1, 2, 3]
    assert (pool.num_free, pool.usage) == (0, 1)


def test_refuses_more_than_there_is_and_keeps_the_rest() -> None:
    pool = BlockPool(2)
    with pytest.raises(BlockError, match="3 blocks asked for, 2 free"):
        pool.allocate(3, owner="a")
    assert pool.num_free == 2


def test_only_the_owner_frees_and_only_once() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1, owner="a")
    with pytest.raises(BlockError, match="not owned"):
        pool.free(blocks, owner="b")
    pool.free(blocks, owner="a")
    with pytest.raises(BlockError, match="not owned"):
        pool.free(blocks, owner="a")
    assert pool.num_free == 2


def test_an_empty_pool_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)
