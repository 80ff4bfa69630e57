"""Pages are free, used by one row, or shared."""

from __future__ import annotations

import pytest
import torch

from dask_pcm.inference.engine.pages import KVShape, PagePool, PoolFullError

SHAPE = KVShape(n_layers=2, n_heads=2, key_dim=4, value_dim=6)


@pytest.fixture
def pool():
    one = PagePool(5, SHAPE, torch.float32, "cpu")
    yield one
    one.validate()


def test_a_shared_page_is_free_once_its_last_row_has_let_go(pool):
    pages = pool.take(3)
    pool.share(pages[:2])
    pool.release(pages)
    assert pool.n_free == 3
    pool.release(pages[:2])
    assert pool.n_free == 5


def test_what_there_is_not_is_not_taken(pool):
    pool.take(4)
    with pytest.raises(PoolFullError, match="2 pages are wanted, and 1 are free"):
        pool.take(2)
    assert pool.n_free == 1


def test_a_copy_has_the_numbers_and_is_another_page(pool):
    page, copy = pool.take(2)
    pool.kv[page] = torch.arange(pool.kv[page].numel()).reshape(pool.kv[page].shape)
    pool.copy(page, copy)
    assert torch.equal(pool.kv[copy], pool.kv[page])
    pool.kv[copy] = 0
    assert pool.kv[page].any()


def test_the_bytes_of_a_page_are_what_the_pool_takes(pool):
    assert pool.kv[:-1].nbytes == 5 * SHAPE.page_bytes(4) == 5 * 2 * 16 * 2 * 10 * 4
