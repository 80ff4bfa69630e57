"""Rows hold pages, and those that began last let go of theirs first."""

from __future__ import annotations

import pytest
import torch

from dask_pcm.inference.engine.holdings import Holdings
from dask_pcm.inference.engine.pages import PAGE_TOKENS, KVShape, PagePool
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.rows import Generated, Prefix
from dask_pcm.inference.engine.timeslice import TimeSlices

SHAPE = KVShape(n_layers=1, n_heads=1, key_dim=2, value_dim=2)


@pytest.fixture
def held():
    pool = PagePool(4, SHAPE, torch.float32, "cpu")
    one = Holdings(pool, Paging(pool, 0), TimeSlices())
    yield one
    one.validate()


def running(held, n_tokens):
    """A row that runs, and has as many tokens stored."""
    row = Generated([*range(n_tokens)], n_prompt=n_tokens, n_max=100)
    held.slices.begin(row.owner)
    part = held.admit(row, n_tokens)
    row.n_done += part.n_tokens
    return row


def test_rows_that_began_last_make_room_for_those_before(held):
    first, second, third = [running(held, PAGE_TOKENS) for _ in range(3)]
    first.tokens += range(2 * PAGE_TOKENS)
    assert held.extend(first, 2 * PAGE_TOKENS).n_tokens == 2 * PAGE_TOKENS
    assert held.running == [first, second] and held.preempted == [third]
    assert (third.pages, third.n_done) == ([], 0) and len(first.pages) == 3
    second.tokens += range(PAGE_TOKENS)
    assert held.extend(second, PAGE_TOKENS) is None  # nothing began after it
    assert held.running == [first, second] and second.n_done == PAGE_TOKENS


def test_a_prefix_without_rows_goes_before_any_row_does(held):
    row = running(held, PAGE_TOKENS)
    others = [Generated([7] * 40 + [k], n_prompt=41, n_max=9) for k in range(8)]
    held.prefixes.plan(others)
    prefix = others[0].prefix
    assert isinstance(prefix, Prefix)
    prefix.n_done = held.extend(prefix, len(prefix.tokens)).n_tokens
    assert held.pool.n_free == 0
    row.tokens += range(PAGE_TOKENS)
    assert held.extend(row, PAGE_TOKENS) is None  # rows wait for the prefix
    for one in others:
        held.prefixes.leave(one)
    assert held.extend(row, PAGE_TOKENS) is not None
    assert held.running == [row] and not held.preempted


def test_a_row_shares_the_full_pages_of_its_prefix_and_copies_the_last(held):
    prefix = Prefix([7] * (PAGE_TOKENS + 3))
    prefix.n_done = held.extend(prefix, len(prefix.tokens)).n_tokens
    row = Generated([*prefix.tokens, 8], n_prompt=PAGE_TOKENS + 4, n_max=1, prefix=prefix)
    part = held.extend(row, PAGE_TOKENS + 4)
    assert list(part.segment.positions) == [PAGE_TOKENS + 3] and list(part.kept) == [0]
    assert row.pages[0] == prefix.pages[0] and row.pages[1] != prefix.pages[1]
    held.let_go(row)
    assert held.pool.n_free == 2  # those of the prefix are still there
