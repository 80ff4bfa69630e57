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
    first = row.n_done // PAGE_TOKENS - row.n_out
    row.pages += pool.take(n_pages_for(n_tokens) - row.n_out - len(row.pages))
    pool.clean()
    write(pool, row.pages[first:])
    row.n_done = n_tokens


def back(pool, paging, row, shared=(), n_out=0):
    pool.share(shared)
    row.n_out = n_out
    paging.back(row, shared, pool.take(n_pages_for(row.n_done) - len(shared) - n_out))
    pool.clean()


def stored(pool, row):
    """What a row that is on the device has stored, also in its first pages if they are off it."""
    off = [slab.memory[index] for slab, index in row.copies[: row.n_out]]
    return torch.stack([*off, *pool.kv[row.pages]])


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


class Walk:
    """Rows that move at random; what each has stored is the same after every move."""

    def __init__(self, pool, paging, seed, lender=None):
        self.pool, self.paging, self.lender = pool, paging, lender
        self.rng = random.Random(seed)
        self.rows, self.expected = [], {}

    def go(self, n_moves, *moves):
        for _ in range(n_moves):
            getattr(self, self.rng.choice(moves))()
            for row in self.rows:
                if row.pages:
                    assert torch.equal(stored(self.pool, row), self.expected[id(row)])
            self.paging.validate()
            self.pool.validate()
        for row in self.rows:
            self.pool.release(row.pages)

    def one(self, condition):
        found = [row for row in self.rows if condition(row)]
        return self.rng.choice(found) if found else None

    def add(self):
        if self.pool.n_free > 8 and len(self.rows) < 14:
            self.note(made(self.pool, self.rng.randint(1, 60)))
            self.rows.append(self.latest)

    def note(self, row):
        self.latest = row
        self.expected[id(row)] = stored(self.pool, row)

    def out(self):
        if row := self.one(lambda row: row.pages):
            self.paging.out(row)

    def out_first(self):
        """A row goes on with its last pages only."""
        if row := self.one(lambda row: len(row.pages) > 1):
            self.paging.out_first(row, self.rng.randint(1, len(row.pages) - 1))

    def back(self):
        """All of a row, or what comes after its first pages."""
        row = self.one(lambda row: row.is_parked)
        if row and n_pages_for(row.n_done) <= self.pool.n_free:
            n_out = self.rng.choice([0, 0, (row.n_done - 1) // PAGE_TOKENS])
            back(self.pool, self.paging, row, n_out=n_out)

    def grow(self):
        if row := self.one(lambda row: row.pages):
            n_tokens = row.n_done + self.rng.randint(1, 20)
            if n_pages_for(n_tokens) - row.n_out - len(row.pages) <= self.pool.n_free:
                grown(self.pool, row, n_tokens)
                self.note(row)

    def end(self):
        if row := self.one(lambda row: True):
            self.rows.remove(row)
            self.pool.release(row.pages)
            row.pages = []
            self.paging.forget(row)

    def want(self):
        loans = [loan for loan in self.lender.loans if not loan.is_closed]
        if loans and self.rng.random() < 0.3:
            self.rng.choice(loans).want_back()

    def evacuate(self):
        self.paging.evacuate(let_go_of(self.pool, self.paging))


@pytest.mark.parametrize("seed", range(3))
def test_random_moves_lose_nothing(pool, seed):
    paging = Paging(pool, most_bytes=30 * SHAPE.page_bytes(4), may_recompute=False)
    Walk(pool, paging, seed).go(400, "add", "out", "out_first", "back", "grow", "end")
    assert paging.n_sent and paging.n_unchanged


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
        pool.release(row.pages)
        paging.forget(row)
        row.pages, row.n_done, row.n_shared = [], 0, 0

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


@pytest.mark.parametrize("seed", range(3))
def test_random_moves_with_lenders_that_come_and_go_lose_nothing(pool, seed):
    paging = Paging(pool, most_bytes=10 * SHAPE.page_bytes(4), may_recompute=False)
    lender = Lender(device=30 * SLAB_BYTES, host=30 * SLAB_BYTES)
    paging.lend(lender.borrow, lender.wake)
    walk = Walk(pool, paging, seed, lender)
    walk.go(600, "add", "out", "out_first", "back", "grow", "want", "evacuate", "end")
    assert paging.n_moved


def test_a_lender_with_little_lends_less(pool):
    paging = Paging(pool, most_bytes=0, may_recompute=False)
    lender = Lender(device=40 * SHAPE.page_bytes(4))
    paging.lend(lender.borrow, lender.wake)
    rows = [made(pool, 16 * 10) for _ in range(3)]
    assert all(paging.out(row) for row in rows)
    assert [len(loan.memory()) // SHAPE.page_bytes(4) for loan in lender.loans] == [16, 16]
    assert not paging.out(made(pool, 16 * 4)) and paging.slabs.n_used == 30


@pytest.mark.parametrize("is_own", [True, False])
def test_what_the_own_device_has_to_spare_is_no_need(pool, is_own):
    """The gate places contexts that need memory beside those that lend it."""
    page_bytes = pool.kv[0].nbytes
    paging = Paging(pool, most_bytes=0, may_recompute=False)
    lender = Lender(is_own=is_own, device=100 * page_bytes)
    paging.lend(lender.borrow, lender.wake)
    row = made(pool, 5 * PAGE_TOKENS)
    assert paging.out(row)
    assert paging.n_bytes == (0 if is_own else 5 * page_bytes)
    paging.forget(row)
