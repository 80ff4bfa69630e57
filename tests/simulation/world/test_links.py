"""Bytes on links, and how files come over them."""

from __future__ import annotations

import pytest

from dask_pcm.simulation.scenario.scenario import Baselines
from dask_pcm.simulation.world.clock import Clock
from dask_pcm.simulation.world.links import Links
from dask_pcm.simulation.world.staging import STORE, FromPeers, FromStore, Swarm


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def links(clock):
    links = Links(clock)
    links.open(STORE, 10)
    for name in "abcde":
        links.open(name, 10)
    return links


class Arrivals(dict):
    """When files arrived where."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def note(self, name):
        return lambda: self.__setitem__(name, self.clock.now)


@pytest.fixture
def arrived(clock):
    return Arrivals(clock)


def play(clock):
    clock.run(lambda: False)


def settings(**values):
    plain = {
        "manager_bytes_s": 10,
        "n_from_each": 3,
        "slow_share": 0,
        "slow_bytes_s": 1,
        "task_s": 0,
        "dispatches_per_s": 1,
        "retry_s": 1,
        "n_retries": 1,
    }
    return Baselines(**{**plain, **values})


def test_the_store_is_shared_fairly(clock, links, arrived):
    store = FromStore(links)
    store.fetch("a", "f", 100, arrived.note("a"))
    clock.at(5, lambda: store.fetch("b", "f", 100, arrived.note("b")))
    play(clock)
    # 50 bytes alone, 50 beside b; then b alone with its last 50.
    assert arrived == pytest.approx({"a": 15, "b": 20})


def test_a_link_is_shared_by_what_it_receives(clock, links, arrived):
    links.send("a", "c", 100, arrived.note("from a"))
    links.send("b", "c", 50, arrived.note("from b"))
    play(clock)
    assert arrived == pytest.approx({"from b": 10, "from a": 15})


def test_unused_bandwidth_of_a_slow_path_is_not_redistributed(clock, links, arrived):
    links.send("a", "b", 100, arrived.note("slow"), most_bytes_s=1)
    links.send("a", "c", 100, arrived.note("fast"))
    play(clock)
    assert arrived == pytest.approx({"slow": 100, "fast": 20})


def test_who_leaves_gets_nothing_more(clock, links, arrived):
    store = FromStore(links)
    store.fetch("a", "f", 100, arrived.note("a"))
    store.fetch("b", "f", 100, arrived.note("b"))
    clock.at(10, lambda: store.left("a"))
    play(clock)
    assert arrived == pytest.approx({"b": 15})


def test_the_manager_sends_one_after_another_and_workers_to_workers(clock, links, arrived):
    peers = FromPeers(links, settings(n_from_each=1), seed=0)
    for name in "abc":
        peers.fetch(name, "f", 100, arrived.note(name))
    play(clock)
    # One at 10 s from the manager; then two at a time, from the manager and from the first.
    assert sorted(arrived.values()) == pytest.approx([10, 20, 20])


def test_a_source_that_leaves_has_its_copies_begin_anew(clock, links, arrived):
    peers = FromPeers(links, settings(n_from_each=1), seed=0)
    peers.fetch("a", "f", 100, arrived.note("a"))
    clock.at(12, lambda: peers.fetch("b", "f", 100, arrived.note("b")))
    clock.at(15, lambda: peers.left("a"))
    play(clock)
    assert arrived == pytest.approx({"a": 10, "b": 25})


def test_slow_copies_are_a_share(clock, links, arrived):
    peers = FromPeers(links, settings(slow_share=1), seed=0)
    peers.fetch("a", "f", 100, arrived.note("a"))
    clock.at(10.5, lambda: peers.fetch("b", "f", 100, arrived.note("b")))
    play(clock)
    assert arrived == pytest.approx({"a": 10, "b": 110.5})  # the manager's own are not


def test_a_swarm_takes_what_its_own_link_takes(clock, links, arrived):
    swarm = Swarm(clock, links)
    for name in "abcd":
        swarm.fetch(name, "f", 100, arrived.note(name))
    clock.at(30, lambda: swarm.fetch("e", "f", 100, arrived.note("e")))
    clock.at(5, lambda: swarm.left("d"))
    play(clock)
    assert arrived == pytest.approx({"a": 13, "b": 13, "c": 13, "e": 43})


def test_a_swarm_waits_for_the_store(clock, arrived):
    links = Links(clock)
    links.open(STORE, 1)
    links.open("a", 10)
    swarm = Swarm(clock, links)
    swarm.fetch("a", "f", 100, arrived.note("a"))
    play(clock)
    assert arrived == pytest.approx({"a": 100})
