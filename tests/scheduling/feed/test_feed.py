from __future__ import annotations

from collections import Counter

from dask_pcm.scheduling.feed.feed import DeviceDemand, Feed, UnitSizing


def new_feed(batch_rows=1, unit_s=1.0, max_rows=10**6, n_lanes=2, ready_s=0.5):
    return Feed(UnitSizing(batch_rows, unit_s, max_rows, n_lanes, ready_s))


def fed(feed, n_uncut, *demand):
    """Sizes that are submitted until there are enough."""
    feed.update_demand(demand)
    sizes = []
    for size in feed.sizes(lambda: n_uncut - sum(size.n_rows for size in sizes)):
        feed.add(size.device, size.n_rows)
        sizes.append(size)
    return sizes


def test_units_are_as_large_as_the_asker_is_fast():
    fast, slow = DeviceDemand("H100", 2, 0.001), DeviceDemand("T4", 2, 0.01)
    sizes = fed(new_feed(), 10**6, fast, slow)
    assert {size.n_rows for size in sizes if size.device == "H100"} == {1000}
    assert {size.n_rows for size in sizes if size.device == "T4"} == {100}
    assert Counter(size.device for size in sizes) == {"H100": 6, "T4": 6}


def test_the_share_of_what_remains_is_the_askers():
    fast, slow = DeviceDemand("H100", 1, 0.001), DeviceDemand("T4", 1, 0.003)
    first, *_ = fed(new_feed(unit_s=1e6), 4000, fast, slow)
    assert (first.device, first.n_rows) == ("H100", 1500)  # half of three quarters
    (alone,) = fed(new_feed(unit_s=1e6, n_lanes=0, ready_s=0.1), 4000, slow._replace(n_workers=1))[
        :1
    ]
    assert (alone.device, alone.n_rows) == ("", 2000)


def test_what_was_cut_for_devices_that_are_gone_is_at_hand_for_the_others():
    feed = new_feed(ready_s=0.0)
    for _ in range(6):
        feed.add("gone", 10)
    assert fed(feed, 10**6, DeviceDemand("T4", 2, 0.01)) == []
    feed.remove("gone", 10)
    assert len(fed(feed, 10**6, DeviceDemand("T4", 2, 0.01))) == 1


def test_short_units_are_kept_by_the_second():
    sizes = fed(new_feed(max_rows=1), 10**6, DeviceDemand("", 1, 0.01))
    assert len(sizes) == 50


def test_no_more_than_a_hundred_units_at_a_time():
    assert len(fed(new_feed(max_rows=1, ready_s=100.0), 10**6, DeviceDemand("", 1, 0.01))) == 100


def test_what_has_ended_tells_the_speed_that_the_gate_does_not_know():
    feed = new_feed()
    assert fed(feed, 10**6, DeviceDemand("", 1, None))[0].n_rows == 1
    feed.learn(2.0, 200)
    assert fed(feed, 10**6, DeviceDemand("", 9, None))[0].n_rows == 100
    assert fed(feed, 10**6, DeviceDemand("", 90, 0.1))[0].n_rows == 10
