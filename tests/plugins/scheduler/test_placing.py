"""The placer plans on a thread, when contexts need memory and when hosts change."""

from __future__ import annotations

from collections import Counter

import pytest
from distributed import wait

import dask_pcm as pcm
from dask_pcm.plugins.scheduler import placing
from tests.support.gated import gated, poll


def load(name):
    return name


A, B = (pcm.Context(load, name, device_memory="1 GiB", name=name) for name in "ab")


def use(i, ctx):
    with pcm.acquire(ctx) as name:
        return name


def plans(s):
    """The gate's state, and the service that plans."""
    gate = s.plugins["pcm-gate"]
    (found,) = (one for one in gate.hub.services if isinstance(one, placing.Placing))
    return gate.hub.state, found


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Little time between two plans, and for each."""
    monkeypatch.setattr(placing, "_INTERVAL_S", 0.5)


@gated(
    [("127.0.0.1", 1), ("127.0.0.2", 1)],
    config={"pcm.ladder.device.budget": "8 GiB", "pcm.gate.tick": "50ms"},
)
async def test_a_need_that_a_worker_tells_makes_a_plan(c, s, gate, a, b):
    await wait([c.submit(use, 0, A, workers=[a.address]), c.submit(use, 1, B, workers=[b.address])])
    state, _ = plans(s)
    assert state.placement is None
    plugin = a.plugins["pcm-contexts"]
    plugin.tell({"op": "pcm-needs", "digest": A.digest, "n_bytes": 3 << 30})
    await poll(lambda: state.placement is not None, 10)
    assert sum(state.placement.hosts.values(), Counter()) == {A.digest: 1, B.digest: 1}
    await b.close()
    await poll(lambda: state.placement is None, 10)  # one host has no neighbours


@gated(
    [("127.0.0.1", 1), ("127.0.0.2", 1)],
    config={"pcm.ladder.device.budget": "8 GiB", "pcm.gate.tick": "50ms"},
)
async def test_a_placer_that_fails_delays_nothing(c, s, gate, a, b):
    before, placing.place = placing.place, None
    try:
        await wait(
            [c.submit(use, 0, A, workers=[a.address]), c.submit(use, 1, B, workers=[b.address])]
        )
        state, _ = plans(s)
        plugin = a.plugins["pcm-contexts"]
        plugin.tell({"op": "pcm-needs", "digest": A.digest, "n_bytes": 3 << 30})
        await poll(lambda: state.contexts.needs, 10)
        assert await c.submit(use, 2, A) == "a"
        assert state.placement is None
    finally:
        placing.place = before
