"""Which worker is given what: alone, cut for a device, the last pieces."""

from __future__ import annotations

from dask_pcm.scheduling.events import (
    Group,
    RunClosed,
    RunReported,
    Work,
    WorkEnded,
    WorkerDraining,
    WorkerJoined,
    WorkParked,
    WorkWithdrawn,
)
from dask_pcm.scheduling.rules.placement import may_get_more
from tests.support.gate_world import A, World, assigned

SUSPECT = Group(("a",), "infer", is_isolated=True)


def warm_workers(*names, n_lanes=2):
    world = World(*names, n_lanes=n_lanes)
    for name in names:
        world.warm(name)
    return world


def end(world, *keys):
    world.now += 1.0
    world.tell(*(WorkEnded(key, is_finished=True) for key in keys))


def test_a_suspect_has_a_worker_for_itself():
    world = warm_workers("w0", "w1")
    world.tell(WorkParked(Work("suspect", SUSPECT, (0,))))
    world.park(10)
    given = assigned(world.decide())
    (its,) = [worker for key, worker in given if key == "suspect"]
    assert [key for key, worker in given if worker == its] == ["suspect"]
    assert len(given) == 3
    end(world, "suspect")
    assert len(assigned(world.decide())) == 2


def test_for_a_suspect_a_busy_worker_runs_empty():
    world = warm_workers("w0")
    world.park(10)
    world.decide()
    world.tell(WorkParked(Work("suspect", SUSPECT, (0,))))
    assert assigned(world.decide()) == []
    end(world, "a0")
    assert assigned(world.decide()) == []  # one lane is free, and stays so
    end(world, "a1")
    assert assigned(world.decide()) == [("suspect", "w0")]
    end(world, "suspect")
    assert len(assigned(world.decide())) == 2


def test_a_worker_is_not_kept_for_what_is_withdrawn():
    world = warm_workers("w0")
    world.park(10)
    world.decide()
    world.tell(WorkParked(Work("suspect", SUSPECT, (0,))))
    world.decide()
    world.tell(WorkWithdrawn("suspect"))
    end(world, "a0")
    assert len(assigned(world.decide())) == 1


def test_suspects_do_not_hold_up_all_workers():
    world = warm_workers("w0", "w1", "w2")
    world.park(20)
    world.decide()
    world.tell(*(WorkParked(Work(f"s{i}", SUSPECT, (0, i))) for i in range(5)))
    world.decide()
    end(world, "a0", "a1", "a2", "a3", "a4", "a5")
    given = assigned(world.decide())
    assert sum(key.startswith("s") for key, _ in given) >= 1
    for name in ("w0", "w1", "w2"):
        keys = [key for key, worker in given if worker == name]
        assert len(keys) == 1 or not any(key.startswith("s") for key in keys)


def test_what_was_cut_for_a_device_goes_there_first():
    world = World()
    for name, device in (("fast", "H100"), ("slow", "T4")):
        world.tell(WorkerJoined(name, 1, device=device))
        world.warm(name)
    for number, device in enumerate(["T4", "H100", "T4", "H100"]):
        world.tell(WorkParked(Work(number, A, (0, number), 1.0, device)))
    assert sorted(assigned(world.decide())) == [(0, "slow"), (1, "fast")]
    end(world, 0, 1)
    assert sorted(assigned(world.decide())) == [(2, "slow"), (3, "fast")]


def test_what_was_cut_for_a_device_that_is_gone_goes_anywhere_small_pieces_first():
    world = World()
    world.tell(WorkerJoined("w", 1, device="T4"))
    world.warm("w")
    for number, (device, n_rows) in enumerate([("H100", 100.0), ("A100", 50.0)]):
        world.tell(WorkParked(Work(number, A, (0, number), n_rows, device)))
    assert assigned(world.decide()) == [(1, "w")]
    end(world, 1)
    assert assigned(world.decide()) == [(0, "w")]


def test_what_users_have_put_first_goes_before_what_was_cut_for_it():
    world = World()
    world.tell(WorkerJoined("w", 1, device="T4"))
    world.warm("w")
    world.tell(WorkParked(Work("own", A, (0,), 1.0, "T4")))
    world.tell(WorkParked(Work("urgent", A, (-1,), 1.0, "H100")))
    assert assigned(world.decide()) == [("urgent", "w")]


def test_last_pieces_go_to_the_worker_that_finishes_first():
    """Speeds one to three, seven hundred pieces: the end is within a piece of the bound."""
    world = warm_workers("fast", "slow", n_lanes=1)
    world.learn(A, "fast", 1.0)
    world.learn(A, "slow", 3.0)
    world.park(700)
    ends = {}
    while world.state.ahead.waiting or ends:
        for key, worker in assigned(world.decide()):
            ends[key] = world.now + (1.0 if worker == "fast" else 3.0)
        if not ends:
            world.now += 0.25
            continue
        key = min(ends, key=ends.get)
        world.now = ends.pop(key) - 1.0
        end(world, key)
    assert world.now <= 700 / (1 + 1 / 3) + 1.5


def test_no_worker_is_kept_empty_that_ends_before():
    world = World()
    for name, ends_in_s in (("dying", 10.0), ("lasting", float("inf"))):
        world.tell(WorkerJoined(name, 1, ends_in_s=ends_in_s))
        world.warm(name)
        world.learn(A, name, 1.0)
    world.park(4, n_rows=5.0)
    world.decide()
    world.tell(WorkParked(Work("suspect", SUSPECT, (0,), 60.0)))
    world.decide()
    kept = [view.address for view in world.state.workers.values() if view.reserved_for]
    assert kept == ["lasting"]
    world.state.workers["lasting"].ends_at = 5.0  # no worker lasts: the one that lasts longest
    world.decide()
    kept = [view.address for view in world.state.workers.values() if view.reserved_for]
    assert kept == ["dying"]


class TestMoreForAWorkerThatEnds:
    def world(self, row_s=0.1):
        world = World("w", "cold")
        world.warm("w")
        world.learn(A, "w", row_s)
        world.tell(WorkerDraining("w", 20.0))
        return world

    def more(self, world, worker="w"):
        return may_get_more(world.state, world.state.workers[worker], world.now)

    def test_what_is_expected_of_a_run_may_come(self):
        world = self.world()
        assert not self.more(world)
        world.tell(RunReported("run", A, 20_000.0, 10))
        assert self.more(world) and not self.more(world, "cold")
        world.now = 18.0
        assert not self.more(world)  # 32 rows take 3.2 s
        world.now = 0.0
        world.tell(RunClosed("run"))
        assert not self.more(world)

    def test_what_waits_may_come_if_it_ends_in_time(self):
        world = self.world()
        world.park(1, n_rows=150.0)
        assert self.more(world)
        world.now = 6.0
        assert not self.more(world)

    def test_the_last_rows_are_as_many_as_they_are(self):
        world = self.world(row_s=5.0)
        world.tell(RunReported("run", A, 3.0, 1))
        assert self.more(world)
        world.tell(RunReported("run", A, 5.0, 1))
        assert not self.more(world)
