"""Those who lend beside those who borrow."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from dask_pcm.scheduling.rules.placer import Placeable, place

GIB = 1 << 30
#: Of the paper, in gibibytes.
PRODUCERS, CONSUMERS = (30, 20, 40, 35, 15, 45, 40), (-20, -10, -30)


def repeated(n_devices):
    """The paper's contexts, repeated until each device has one."""
    values = itertools.islice(itertools.cycle([*PRODUCERS, *CONSUMERS]), n_devices)
    counted = Counter(enumerate_equal(values))
    return [Placeable(f"{value}", value * GIB, n) for value, n in counted.items()]


def enumerate_equal(values):
    return list(values)


def balances(plan, contexts):
    spare = {one.name: one.spare_bytes for one in contexts}
    return {
        host: sum(spare[name] * n for name, n in copies.items())
        for host, copies in plan.hosts.items()
    }


def cost_of(plan, contexts):
    spare = {one.name: one.spare_bytes for one in contexts}
    surplus = [
        sum(n if spare[name] >= 0 else -n for name, n in copies.items())
        for copies in plan.hosts.values()
    ]
    assert plan.most_surplus == max(surplus)
    assert plan.most_bytes == max(balances(plan, contexts).values())
    return max(0, plan.most_bytes) / GIB + max(0, plan.most_surplus)


@pytest.mark.parametrize(("n_hosts", "expected"), [(2, 181), (4, 144), (8, 144)])
def test_the_papers_contexts_are_placed_best(n_hosts, expected):
    contexts = repeated(8 * n_hosts)
    hosts = {f"h{k}": 8 for k in range(n_hosts)}
    plan = place(contexts, hosts)
    assert plan.gap == 0 and plan.n_alone == 0
    assert cost_of(plan, contexts) == expected
    total = sum(plan.hosts.values(), Counter())
    assert total == Counter({one.name: one.n_copies for one in contexts})
    assert all(copies.total() == 8 for copies in plan.hosts.values())
    # Each borrower has a lender, and the host what its borrowers need.
    assert all(balance >= 0 for balance in balances(plan, contexts).values())


def best_by_trying(contexts, sizes):
    """The least cost of all plans in which each borrower has a lender."""
    copies = [one for one in contexts for _ in range(one.n_copies)]
    best = None
    for at in itertools.product(range(len(sizes)), repeat=len(copies)):
        if any(at.count(k) > size for k, size in enumerate(sizes)):
            continue
        balance, surplus = [0] * len(sizes), [0] * len(sizes)
        for host, one in zip(at, copies, strict=True):
            balance[host] += one.spare_bytes
            surplus[host] += 1 if one.spare_bytes >= 0 else -1
        if min(surplus) < 0:
            continue
        cost = max(0, *balance) / GIB + max(0, *surplus)
        best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_is_better(seed):
    rng = random.Random(seed)
    kinds = range(rng.randint(2, 4))
    contexts = [
        Placeable(f"c{k}", rng.choice([-30, -10, 5, 20, 45]) * GIB, rng.randint(1, 2))
        for k in kinds
    ]
    sizes = [rng.randint(2, 4) for _ in range(3)]
    plan, best = (
        place(contexts, dict(zip("abc", sizes, strict=True))),
        best_by_trying(contexts, sizes),
    )
    if best is None:
        assert plan is None or plan.n_alone
    else:
        assert plan.n_alone == 0 and cost_of(plan, contexts) == pytest.approx(best)


def test_without_enough_lenders_as_few_borrowers_as_possible_are_alone():
    contexts = [Placeable("lends", 10 * GIB, 1), Placeable("needs", -5 * GIB, 3)]
    plan = place(contexts, {"a": 2, "b": 2})
    assert plan.n_alone == 2 and plan.gap == 0
    assert plan.n_on("a", "lends") + plan.n_on("b", "lends") == 1
    host = "a" if plan.n_on("a", "lends") else "b"
    assert plan.n_on(host, "needs") == 1


def test_what_cannot_be_placed():
    assert place([], {"a": 1}) is None
    assert place([Placeable("x", 1, 0)], {"a": 1}) is None
    assert place([Placeable("x", 1, 3)], {"a": 1, "b": 1}) is None
    plan = place([Placeable("x", 0, 1)], {"a": 1})  # nothing to lend and nothing needed
    assert plan.n_on("a", "x") == 1 and plan.n_on("b", "x") == 0
