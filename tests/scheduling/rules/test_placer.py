"""Those who lend beside those who borrow."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from dask_pcm.scheduling.actions import Load
from dask_pcm.scheduling.events import HostsPlanned, MemoryNeeded, ResidencyReported, WorkerJoined
from dask_pcm.scheduling.rules.placer import Placeable, place, planned_hosts, to_place
from dask_pcm.tiers import Tier
from tests.support.gate_world import A, World, warmed

GIB = 1 << 30
#: Of the paper, in gibibytes.
PRODUCERS, CONSUMERS = (30, 20, 40, 35, 15, 45, 40), (-20, -10, -30)


def repeated(n_devices):
    """The paper's contexts, repeated until each device has one."""
    values = itertools.islice(itertools.cycle([*PRODUCERS, *CONSUMERS]), n_devices)
    counted = Counter(values)
    return [Placeable(f"{value}", value * GIB, n) for value, n in counted.items()]


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


@pytest.mark.parametrize("n_hosts", [2, 4, 8])
def test_amounts_that_are_no_whole_gibibytes_are_placed_as_well(n_hosts):
    """As those of real devices: each kind has an odd number of bytes more."""
    rng = random.Random(n_hosts)
    contexts = [
        replace(one, spare_bytes=one.spare_bytes + rng.randrange(1, GIB // 2, 2))
        for one in repeated(8 * n_hosts)
    ]
    plan = place(contexts, {f"h{k}": 8 for k in range(n_hosts)})
    assert plan.n_alone == 0 and plan.gap < 0.01
    assert all(balance >= 0 for balance in balances(plan, contexts).values())
    even = sum(one.spare_bytes * one.n_copies for one in contexts) / n_hosts
    whole = place(repeated(8 * n_hosts), {f"h{k}": 8 for k in range(n_hosts)})
    even_whole = sum(int(name) * n for c in whole.hosts.values() for name, n in c.items()) / n_hosts
    cost_of(plan, contexts)
    assert (plan.most_bytes - even) / GIB < whole.most_bytes / GIB - even_whole + 8


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


# -- in the gate -----------------------------------------------------------------------------------


class Hosts(World):
    """Two hosts of four devices, of 80 GiB each."""

    def __init__(self):
        super().__init__()
        for host in "xy":
            for k in range(4):
                self.tell(WorkerJoined(f"{host}{k}", 2, device_bytes=80 * GIB, host=host))

    def hold(self, context, n_gib, *workers):
        for worker in workers:
            self.tell(
                ResidencyReported(worker, context, Tier.DEVICE, seconds=1.0, n_bytes=n_gib * GIB)
            )

    def plan(self):
        wanted = to_place(self.state)
        plan = None if wanted is None else place(*wanted)
        self.tell(HostsPlanned(plan))
        return plan


def test_without_a_need_there_is_no_plan():
    world = Hosts()
    world.hold("a", 70, "x0")
    world.hold("b", 10, "x1", "y0")
    assert to_place(world.state) is None
    world.tell(MemoryNeeded("c", GIB))  # it is on no device
    assert to_place(world.state) is None
    world.tell(MemoryNeeded("a", 40 * GIB), MemoryNeeded("a", 20 * GIB))
    contexts, hosts = to_place(world.state)
    # A third of the devices each holds a copy of "a", which needs 40 GiB; "b" has 70 to lend.
    assert contexts == [Placeable("a", -40 * GIB, 2), Placeable("b", 70 * GIB, 5)]
    assert hosts == {"x": 4, "y": 4}


def test_a_new_copy_goes_to_a_host_where_it_finds_a_lender():
    world = Hosts()
    world.hold("a", 70, "x0")
    world.hold("b", 10, "x1", "x2", "y0")
    world.tell(MemoryNeeded("a", 40 * GIB))
    plan = world.plan()
    assert plan.n_on("x", "a") == plan.n_on("y", "a") == 1
    has_more = planned_hosts(world.state, ["a"])
    assert has_more("y") and not has_more("x") and not has_more("unknown")
    world.learn(A, "x0", 1.0)
    world.park(40)
    (first, *_) = [one for one in world.decide() if isinstance(one, Load)]
    assert first.worker.startswith("y")


def test_a_plan_delays_no_work():
    """A host off the plan is used all the same, if all workers are worth it."""
    world = Hosts()
    world.hold("a", 70, "x0")
    world.hold("b", 10, "y0")
    world.tell(MemoryNeeded("a", 40 * GIB))
    world.plan()
    world.learn(A, "x0", 1.0)
    world.park(4000)
    assert {"x1", "x2", "x3", "y1", "y2", "y3"} <= warmed(world.decide())
