"""Pages go off the device and come back as they were; what has not changed is not sent again."""

from __future__ import annotations

import random

import pytest
import torch

from dask_pcm.inference.engine.pages import PAGE_TOKENS, KVShape, PagePool, n_pages_for
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.rows import Generated
from dask_pcm.inference.engine.slabs import Slabs
from tests.support.lenders import Lender

SHAPE = KVShape(n_layers=2, n_heads=2, key_dim=4, value_dim=4)


@pytest.fixture
def pool():
    one = PagePool(40, SHAPE, torch.float32, "cpu")
    yield one
    one.validate()


def made(pool, n_tokens, shared=()):
    """A row with tokens stored, after the pages of a prefix."""
    row = Generated([1] * 400, n_prompt=400, n_max=100)
    pool.share(shared)
    row.pages = [*shared, *pool.take(n_pages_for(n_tokens) - len(shared))]
    row.n_done, row.n_shared = n_tokens, len(shared)
    pool.clean()
    write(pool, row.pages[len(shared) :])
    return row


def write(pool, pages):
    pool.kv[pages] = torch.rand_like(pool.kv[pages])


def grown(pool, row, n_tokens):
    """The row goes on: it writes its last page and those after it."""
    first = row.n_done // PAGE_TOKENS
    row.pages += pool.take(n_pages_for(n_tokens) - len(row.pages))
    pool.clean()
    write(pool, row.pages[first:])
    row.n_done = n_tokens


def back(pool, paging, row, shared=()):
    pool.share(shared)
    paging.back(row, shared, pool.take(n_pages_for(row.n_done) - len(shared)))
    pool.clean()


def stored(pool, row):
    return pool.kv[row.pages].clone()


def test_a_row_comes_back_to_the_bit(pool):
    paging = Paging(pool)
    row = made(pool, 50)
    before = stored(pool, row)
    assert paging.out(row, is_wanted=True)
    assert row.is_parked and pool.n_free == pool.n_pages
    others = pool.take(pool.n_pages)
    write(pool, others)
    pool.release(others)
    back(pool, paging, row)
    assert torch.equal(stored(pool, row), before) and not row.is_parked
    paging.forget(row)
    paging.validate()
    assert not paging.slabs.n_used


def test_what_has_not_changed_is_not_sent_again(pool):
    paging = Paging(pool, may_recompute=False)
    row = made(pool, 70)  # four full pages, and one that is written on
    assert paging.out(row)
    assert (paging.n_sent, paging.n_unchanged) == (5, 0)
    back(pool, paging, row)
    grown(pool, row, 100)
    before = stored(pool, row)
    assert paging.out(row)
    assert (paging.n_sent, paging.n_unchanged) == (5 + 3, 4)
    back(pool, paging, row)
    assert torch.equal(stored(pool, row), before)
    paging.validate()


def test_pages_of_a_prefix_stay(pool):
    paging = Paging(pool, may_recompute=False)
    prefix = made(pool, 32)
    row = made(pool, 50, shared=prefix.pages)
    before = stored(pool, row)
    assert paging.out(row)
    assert paging.n_sent == 2 and pool.n_free == pool.n_pages - 2
    back(pool, paging, row, prefix.pages)
    assert torch.equal(stored(pool, row), before) and row.n_shared == 2


def test_without_room_nothing_is_lost(pool):
    page_bytes = SHAPE.page_bytes(4)
    paging = Paging(pool, most_bytes=4 * page_bytes, may_recompute=False)
    first, second = made(pool, 60), made(pool, 30)
    assert paging.out(first)
    before = stored(pool, second)
    assert not paging.out(second)
    assert torch.equal(stored(pool, second), before) and not second.is_parked
    paging.validate()


def test_copies_of_rows_on_the_device_make_room(pool):
    paging = Paging(pool, most_bytes=4 * SHAPE.page_bytes(4), may_recompute=False)
    first, second = made(pool, 60), made(pool, 60)
    paging.out(first)
    back(pool, paging, first)
    assert paging.slabs.n_free == 0
    assert paging.out(second) and not first.copies
    before = stored(pool, first)
    back(pool, paging, second)
    assert paging.out(first)
    back(pool, paging, first)
    assert torch.equal(stored(pool, first), before)
    paging.validate()


def test_a_row_is_computed_again_where_that_is_cheaper_and_changes_nothing(pool):
    slow = Paging(pool)
    for _ in range(50):
        slow.observe(100, 1e-7)  # tokens cost next to nothing
    assert not slow.out(made(pool, 30))
    kept = Paging(pool, may_recompute=False)
    for _ in range(50):
        kept.observe(100, 1e-7)
    assert kept.out(made(pool, 30))
    dear = Paging(pool)
    dear.observe(1, 100.0)
    assert dear.out(made(pool, 30))


def test_in_half_precision_nothing_is_computed_again_for_its_price():
    pool = PagePool(40, SHAPE, torch.bfloat16, "cpu")
    paging = Paging(pool)
    for _ in range(50):
        paging.observe(100, 1e-7)
    row = made(pool, 30)
    before = stored(pool, row)
    assert paging.out(row)
    back(pool, paging, row)
    assert torch.equal(stored(pool, row), before)


def test_random_moves_lose_nothing(pool):
    paging = Paging(pool, most_bytes=30 * SHAPE.page_bytes(4), may_recompute=False)
    rng = random.Random(0)
    rows, expected = [], {}
    for _ in range(400):
        here = [row for row in rows if row.pages]
        away = [row for row in rows if not row.pages]
        move = rng.choice(["add", "out", "back", "grow", "end"])
        if move == "add" and pool.n_free > 8 and len(rows) < 12:
            rows.append(made(pool, rng.randint(1, 60)))
            expected[id(rows[-1])] = stored(pool, rows[-1])
        elif move == "out" and here:
            paging.out(rng.choice(here))
        elif move == "back" and away:
            row = rng.choice(away)
            if n_pages_for(row.n_done) <= pool.n_free:
                back(pool, paging, row)
        elif move == "grow" and here:
            row = rng.choice(here)
            n_tokens = row.n_done + rng.randint(1, 20)
            if n_pages_for(n_tokens) - len(row.pages) <= pool.n_free:
                grown(pool, row, n_tokens)
                expected[id(row)] = stored(pool, row)
        elif move == "end" and rows:
            row = rows.pop(rng.randrange(len(rows)))
            pool.release(row.pages)
            row.pages = []
            paging.forget(row)
        for row in rows:
            if row.pages:
                assert torch.equal(stored(pool, row), expected[id(row)])
        paging.validate()
        pool.validate()
    assert paging.n_sent and paging.n_unchanged
    for row in rows:
        pool.release(row.pages)


def test_slabs_take_memory_as_it_is_needed():
    sizes = []
    slabs = Slabs(lambda n: sizes.append(n) or torch.empty(n, 3), most_pages=100)
    assert slabs.n_free == 100 and not sizes
    first = slabs.take(70)
    assert sizes == [64, 36] and slabs.n_used == 70
    assert slabs.take(31) is None
    slabs.release(first)
    slabs.validate()
    assert len(slabs.take(100)) == 100 and sizes == [64, 36]
    slabs.close()
    assert slabs.n_free == 0


SLAB_BYTES = 64 * SHAPE.page_bytes(4)


def let_go_of(pool, paging):
    """As ``Holdings.let_go``."""

    def let_go(row):
        paging.forget(row)
        row.n_done = row.n_shared = 0

    return let_go


def test_pages_go_to_a_device_before_the_host_and_to_neighbours_last(pool):
    paging = Paging(pool, most_bytes=4 * SHAPE.page_bytes(4), may_recompute=False)
    lender = Lender(device=SLAB_BYTES, host=SLAB_BYTES)
    paging.lend(lender.borrow, lender.wake)
    rows = [made(pool, 16 * 10) for _ in range(4)]
    before = [stored(pool, row) for row in rows]
    for row in rows:
        assert paging.out(row)
    assert len(lender.loans) == 1 and paging.slabs.n_lent == 40
    others = [made(pool, 16 * 10) for _ in range(3)]
    for row in others:
        assert paging.out(row)
    # 24 places of the device are left, then 4 of the host, then those that a neighbour lends.
    assert len(lender.loans) == 2 and paging.slabs.n_lent == 70 - 4
    for row, numbers in zip(rows, before, strict=True):
        back(pool, paging, row)
        assert torch.equal(stored(pool, row), numbers)
    for row in (*rows, *others):
        paging.forget(row)
    paging.validate()
    paging.slabs.return_lent(is_all=True)
    assert all(loan.is_closed for loan in lender.loans)


def test_what_is_wanted_back_moves_on_to_the_bit(pool):
    paging = Paging(pool, may_recompute=False)
    lender = Lender(device=SLAB_BYTES)
    paging.lend(lender.borrow, lender.wake)
    here, away = made(pool, 40), made(pool, 50)
    before = stored(pool, away)
    paging.out(here)
    paging.out(away)
    back(pool, paging, here)
    kept = stored(pool, here)
    (loan,) = lender.loans
    loan.want_back()
    assert lender.n_wakes == 1 and not loan.is_closed
    lost = []
    paging.evacuate(lost.append)
    assert loan.is_closed and not lost and paging.n_moved == 4
    paging.validate()
    back(pool, paging, away)
    assert torch.equal(stored(pool, away), before)
    assert torch.equal(stored(pool, here), kept)


def test_what_has_no_other_room_is_computed_again(pool):
    paging = Paging(pool, most_bytes=0, may_recompute=False)
    lender = Lender(device=SLAB_BYTES)
    paging.lend(lender.borrow, lender.wake)
    row = made(pool, 50)
    assert paging.out(row)
    lender.loans[0].want_back()
    paging.evacuate(let_go_of(pool, paging))
    assert lender.loans[0].is_closed and not row.n_done and not paging._parked
    paging.validate()
    assert not paging.out(made(pool, 20))  # a lender that wants memory back gets no more pages


def test_random_moves_with_lenders_that_come_and_go_lose_nothing(pool):
    paging = Paging(pool, most_bytes=10 * SHAPE.page_bytes(4), may_recompute=False)
    lender = Lender(device=30 * SLAB_BYTES, host=30 * SLAB_BYTES)
    paging.lend(lender.borrow, lender.wake)
    rng = random.Random(1)
    rows, expected = [], {}
    for _ in range(600):
        here = [row for row in rows if row.pages]
        away = [row for row in rows if row.is_parked]
        move = rng.choice(["add", "out", "back", "want", "evacuate", "end"])
        if move == "add" and pool.n_free > 8 and len(rows) < 14:
            rows.append(made(pool, rng.randint(1, 60)))
            expected[id(rows[-1])] = stored(pool, rows[-1])
        elif move == "out" and here:
            paging.out(rng.choice(here))
        elif move == "back" and away:
            row = rng.choice(away)
            if n_pages_for(row.n_done) <= pool.n_free:
                back(pool, paging, row)
        elif move == "want" and rng.random() < 0.3:
            loans = [loan for loan in lender.loans if not loan.is_closed]
            if loans:
                rng.choice(loans).want_back()
        elif move == "evacuate":
            paging.evacuate(let_go_of(pool, paging))
        elif move == "end" and rows:
            row = rows.pop(rng.randrange(len(rows)))
            pool.release(row.pages)
            row.pages = []
            paging.forget(row)
        for row in rows:
            if row.pages:
                assert torch.equal(stored(pool, row), expected[id(row)])
        paging.validate()
        pool.validate()
    assert paging.n_moved
    for row in rows:
        pool.release(row.pages)


def test_a_lender_with_little_lends_less(pool):
    paging = Paging(pool, most_bytes=0, may_recompute=False)
    lender = Lender(device=40 * SHAPE.page_bytes(4))
    paging.lend(lender.borrow, lender.wake)
    rows = [made(pool, 16 * 10) for _ in range(3)]
    assert all(paging.out(row) for row in rows)
    assert [len(loan.memory()) // SHAPE.page_bytes(4) for loan in lender.loans] == [16, 16]
    assert not paging.out(made(pool, 16 * 4)) and paging.slabs.n_used == 30
