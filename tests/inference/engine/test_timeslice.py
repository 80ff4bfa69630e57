"""Whose turn it is: by class, by client, then by request."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_pcm.inference.engine.timeslice import UNKNOWN, Counters, Kind, Owner, TimeSlices

A, B = Owner(Kind.QUESTION, "a"), Owner(Kind.QUESTION, "b")
BATCH, OTHER_BATCH = Owner(Kind.BATCH, "a"), Owner(Kind.BATCH, "b")


@dataclass
class Row:
    owner: Owner
    n_turns: int = 0
    began_at: int = 0
    waits_since: int = 0


@pytest.fixture
def slices():
    one = TimeSlices()
    yield one
    one.validate()


def begin(slices, *owners):
    for owner in owners:
        slices.begin(owner)


def test_the_client_that_was_served_least_is_next(slices):
    begin(slices, A, B)
    slices.charge(A, 10, 0)
    assert slices.next_of([A, B]) == B
    slices.charge(B, 0, 6)  # a new token counts as two of a prompt
    assert slices.next_of([A, B]) == A


def test_idle_time_earns_no_credit(slices):
    begin(slices, A, B)
    slices.end(B)
    for _ in range(100):
        slices.charge(A, 50, 10)
    slices.begin(B)
    slices.charge(B, 1, 0)
    assert slices.next_of([A, B]) == A


def test_leaving_for_a_moment_pays_no_debt(slices):
    begin(slices, A, B)
    slices.charge(A, 500, 0)
    slices.end(A)
    slices.begin(A)
    slices.charge(B, 499, 0)
    assert slices.next_of([A, B]) == B


def test_one_that_comes_when_nobody_is_there_is_no_worse_off_than_the_last():
    counters = Counters()
    counters.begin("a")
    counters.charge("a", 100)
    counters.end("a")
    counters.begin("b")
    assert counters["b"] == 100
    counters.begin("a")
    assert counters["a"] == 100


def test_clients_that_left_are_forgotten():
    counters = Counters()
    counters.begin("there")
    for k in range(1000):
        counters.begin(k)
        counters.charge(k, 5)
        counters.end(k)
        counters.charge("there", 5)
    counters.begin("last")
    assert len(counters._served) <= 3
    counters.validate()


def test_questions_go_before_batches_for_a_burst_and_then_share(slices):
    begin(slices, A, BATCH)
    served = {A: 0, BATCH: 0}
    n_first = 0
    for _ in range(200_000):
        owner = slices.next_of([A, BATCH])
        slices.charge(owner, 1, 0)
        served[owner] += 1
        n_first += not served[BATCH]
    assert n_first >= 4096  # a burst is served at once
    assert served[A] - n_first == pytest.approx(8 * served[BATCH], rel=0.01)


def test_a_batch_alone_has_everything(slices):
    begin(slices, BATCH)
    slices.charge(BATCH, 100_000, 0)
    assert slices.next_of([BATCH]) == BATCH
    begin(slices, A)
    assert slices.next_of([A, BATCH]) == A


def test_questions_of_a_client_take_turns_of_a_slice(slices):
    begin(slices, A)
    old, new = Row(A, n_turns=40, began_at=0), Row(A, began_at=1)
    assert slices.turn(new, 40) < slices.turn(old, 40)
    assert slices.may_displace(new, old, 40)
    assert not slices.may_displace(old, new, 40)
    new.n_turns = 15
    assert slices.may_displace(new, old, 40)
    old.n_turns = 15  # both in their first slice: what came first stays
    assert slices.turn(old, 40) < slices.turn(new, 40)
    assert not slices.may_displace(new, old, 40) and not slices.may_displace(old, new, 40)


def test_a_long_question_is_not_kept_out_for_ever_by_new_ones(slices):
    begin(slices, A)
    long, new = Row(A, n_turns=300, waits_since=300), Row(A, began_at=9, waits_since=600)
    assert slices.turn(new, 500) < slices.turn(long, 500)
    assert slices.turn(long, 600) < slices.turn(new, 600)
    assert slices.may_displace(long, Row(A, n_turns=1, waits_since=600), 600)


def test_rows_of_a_batch_do_not_displace_each_other(slices):
    begin(slices, BATCH)
    new, old = Row(BATCH, began_at=5), Row(BATCH, n_turns=400, waits_since=-10_000)
    assert not slices.may_displace(new, old, 400) and not slices.may_displace(old, new, 400)


def test_batches_of_two_clients_displace_each_other_a_slice_apart(slices):
    begin(slices, BATCH, OTHER_BATCH)
    mine, other = Row(BATCH, n_turns=3), Row(OTHER_BATCH)
    slices.charge(BATCH, 31, 0)
    assert not slices.may_displace(other, mine, 9)
    slices.charge(BATCH, 1, 0)
    assert slices.may_displace(other, mine, 9) and not slices.may_displace(mine, other, 9)


def test_a_new_question_waits_for_no_slice(slices):
    begin(slices, A, BATCH)
    new, batch = Row(A), Row(BATCH, n_turns=1)
    assert slices.may_displace(new, batch, 1)
    slices.charge(A, 4096 + 8 * 5, 0)  # ahead of what a burst may have
    assert not slices.may_displace(new, batch, 1)


@pytest.mark.parametrize("n", [0, -1])
def test_a_slice_of_nothing_is_refused(n):
    with pytest.raises(ValueError, match=f"1 token at least; found {n}"):
        TimeSlices(n)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 200)), min_size=50, max_size=300))
def test_those_who_always_have_work_are_served_alike(requests):
    """Apart by no more than the largest request, however requests come."""
    slices = TimeSlices()
    owners = [Owner(Kind.BATCH, client) for client in "abc"]
    begin(slices, *owners)
    served = dict.fromkeys(owners, 0)
    sizes = {
        owner: [n for client, n in requests if client == owner.client] or [1] for owner in owners
    }
    for k in range(300):
        owner = slices.next_of(owners)
        n = sizes[owner][k % len(sizes[owner])]
        slices.charge(owner, n, 0)
        served[owner] += n
        assert max(served.values()) - min(served.values()) <= 200


def test_rows_without_a_client_are_a_batch():
    assert Owner(Kind.BATCH, "") == UNKNOWN


def test_a_client_is_lifted_to_those_of_its_class(slices):
    begin(slices, A, BATCH)
    slices.charge(BATCH, 50_000, 0)
    begin(slices, OTHER_BATCH)
    assert slices.served(OTHER_BATCH) == slices.served(BATCH)


def test_one_that_is_late_stays_late_for_a_slice(slices):
    begin(slices, A)
    row = Row(A, n_turns=300, waits_since=100)
    now, n_late = 400, 0
    while slices.turn(row, now)[0] < 0:
        row.waits_since, now, n_late = slices.served_at(row, now), now + 1, n_late + 1
    assert n_late >= 3
    other = Row(A, n_turns=90, waits_since=-900)
    late = Row(A, n_turns=300, waits_since=-900)
    assert not slices.may_displace(other, late, 400) and not slices.may_displace(late, other, 400)
