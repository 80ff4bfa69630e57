from __future__ import annotations

import pytest

from dask_pcm.config import Config
from dask_pcm.scheduling.feed.feed import DeviceDemand
from dask_pcm.simulation.policies.lanes import Lanes
from dask_pcm.simulation.policies.window import SimulatedUnit, SimulatedWindow
from dask_pcm.simulation.world.lives import draw_lives
from dask_pcm.simulation.world.record import Record
from dask_pcm.simulation.world.world import Worker, World
from tests.support.scenarios import FREE, pool, run, world


def drained(window, n_workers, row_s):
    """Sizes of all units, each taken in before the next are cut."""
    sizes = []
    window.update_demand([DeviceDemand("", n_workers, None)])
    while not window.is_empty:
        for unit in window.feed():
            sizes.append(unit.n_rows)
            window.ended(unit.key, unit.n_rows * row_s)
    return sizes


def window_of(tmp_path, n_rows, **values):
    return SimulatedWindow(world(tmp_path, runs=run(n_rows, **values)).runs[0], Config.read())


def test_units_grow_with_the_speed_and_shrink_at_the_end(tmp_path):
    sizes = drained(window_of(tmp_path, 1_000, batch_rows=4, task_rows=1_000), 2, 0.01)
    assert sum(sizes) == 1_000
    assert sizes[0] == 4 and max(sizes) == 100 and sizes[-1] <= 8


def test_units_are_filled_across_pieces(tmp_path):
    sizes = drained(window_of(tmp_path, 1_000, batch_rows=8, task_rows=100), 1, 0.001)
    assert sum(sizes) == 1_000 and max(sizes) > 100
    assert sum(size % 8 != 0 for size in sizes) <= 1  # the last one


def test_small_pieces_are_put_together(tmp_path):
    sizes = drained(window_of(tmp_path, 1_000, batch_rows=10, task_rows=3), 1, 0.01)
    assert sum(sizes) == 1_000
    assert sizes[0] >= 10 and max(sizes) > 30


def test_what_was_journalled_is_not_outstanding(tmp_path):
    window = window_of(tmp_path, 10, batch_rows=4, task_rows=10)
    first, *others = window.feed()
    assert [unit.n_rows for unit in (first, *others)] == [4, 4, 2]
    window.shrink(first, 4)
    assert first.n_rows == 0
    for unit in (first, *others):
        window.ended(unit.key, 1.0)
    assert window.is_empty


@pytest.mark.parametrize(
    ("n_lanes", "expected"),
    [
        (1, [3, 6, 9]),
        (2, [3, 4, 6]),  # the third is read as soon as the first is committed
    ],
)
def test_a_second_lane_hides_reading_and_committing(tmp_path, n_lanes, expected):
    """Three units: each is read in 1 s, inferred in 1 s and committed in 1 s."""
    scenario = world(tmp_path, overheads={**FREE, "unit_s": 2}, pools={"one": pool()})
    here = World(scenario, Record())
    worker = Worker(next(next(draw_lives(scenario, 0))))
    ended = []
    lanes = Lanes(here, worker, n_lanes, lambda *_: ended.append(here.clock.now))
    for number in range(3):
        lanes.send(SimulatedUnit(number, scenario.runs[0], 1))
    here.clock.run(lambda: False)
    assert ended == pytest.approx(expected)
