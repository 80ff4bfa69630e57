"""Requests to one device: by hand, and what no policy may break."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dask_pcm.errors import ScenarioError
from dask_pcm.simulation import read_any, read_scenario
from dask_pcm.simulation.serving import Burst, Link
from dask_pcm.simulation.serving.device import (
    FIRST_COME,
    HOST,
    LENT,
    POLICIES,
    Request,
    _Device,
    arrivals,
    long_prompt_rate,
    play,
)

BURST = read_any("burst")
SMALL = replace(
    BURST,
    memory_bytes=1_000,
    token_bytes=1,
    step_s=1.0,
    token_s=0.01,
    step_tokens=100,
    host=Link(100.0),
    lent=Link(1_000.0),
    prompt=(50, 120),
    output=(5, 40),
    seconds=400.0,
    burst=Burst(100.0, 30, (5, 10), (2, 5)),
)


def device_of(spec, *requests, link=None, is_in_order=False):
    device = _Device(spec, link or spec.host, is_in_order)
    for one in requests:
        device.add(one)
    return device


@pytest.mark.parametrize("is_in_order", [True, False])
def test_one_request_by_hand(is_in_order):
    one = Request(0.0, 150, 3, 0)
    device = device_of(SMALL, one, is_in_order=is_in_order)
    device.step()
    assert device.now == pytest.approx(1 + 0.01 * 100) and one.first_s is None
    device.step()
    assert one.first_s == device.now == pytest.approx(2.0 + 1.5)
    for _ in range(2):
        assert one.end_s is None
        device.step()
    assert one.end_s == device.now == pytest.approx(3.5 + 2 * 1.01)
    assert not device.open and device.moved_s == 0


def test_what_makes_room_is_sent_once_and_comes_back():
    long, new = Request(0.0, 100, 300, 0), Request(0.0, 20, 1, 1)
    device = device_of(replace(SMALL, memory_bytes=150), long)
    for _ in range(20):  # 100 of the prompt, and 19 more: beyond a slice
        device.step()
    assert long.n_done == 119 and device.moved_s == 0
    device.add(replace_prompt(new, 60))
    device.step()  # it does not fit beside the other one
    assert device.moved_s == pytest.approx(119 / 100) and not long.is_here
    device.step()
    assert device.moved_s == pytest.approx(2 * 119 / 100) and long.is_here
    assert long.n_copied == 119 and long.n_done == 120


def replace_prompt(one, n_prompt):
    one.n_prompt = n_prompt
    return one


@pytest.mark.parametrize("policy", POLICIES)
def test_all_are_answered_and_memory_is_never_exceeded(policy, monkeypatch):
    step = _Device.step

    def checked(self):
        step(self)
        if not self.is_in_order:
            assert sum(one.n_done for one in self.open if one.is_here) <= self.room

    monkeypatch.setattr(_Device, "step", checked)
    played = play(SMALL, policy, 0.3)
    for one in played.requests:
        assert one.n_done == one.n_all - 1
        assert one.at_s < one.first_s <= one.end_s <= played.end_s
    assert played.tokens_s * played.end_s == pytest.approx(sum(r.n_output for r in played.requests))


def test_the_same_requests_come_whatever_the_policy():
    found = [[(r.at_s, r.n_prompt, r.n_output) for r in arrivals(SMALL, 0.3, 7)] for _ in range(2)]
    assert found[0] == found[1] and len(found[0]) > 100
    assert found[0] != [(r.at_s, r.n_prompt, r.n_output) for r in arrivals(SMALL, 0.3, 8)]
    played = {policy: play(SMALL, policy, 0.3, 7) for policy in POLICIES}
    assert all(
        [r.at_s for r in one.requests] == [at for at, *_ in found[0]] for one in played.values()
    )


def test_first_come_is_first_served():
    firsts = [one.first_s for one in play(SMALL, FIRST_COME, 0.3).requests]
    assert firsts == sorted(firsts)


def test_slices_answer_a_burst_sooner_and_lent_memory_keeps_the_rate():
    order, host, lent = (play(SMALL, policy, 0.3) for policy in (FIRST_COME, HOST, LENT))
    assert max(one.first_s(0.5, True) for one in (host, lent)) < order.first_s(0.5, True) / 2
    assert lent.moved_s < host.moved_s and lent.end_s < host.end_s


def test_the_papers_two_figures_are_calibrated():
    """20 times as soon under bursts; 4 times as many tokens after one long prompt."""
    rate = 1.6
    firsts = {
        policy: sum(play(BURST, policy, rate, seed).first_s(0.5, True) for seed in range(3))
        for policy in (FIRST_COME, LENT)
    }
    assert firsts[FIRST_COME] / firsts[LENT] == pytest.approx(20, rel=0.15)
    lent, host = (long_prompt_rate(BURST, link) for link in (BURST.lent, BURST.host))
    assert lent / host == pytest.approx(4, rel=0.15)


def test_a_rate_at_which_none_comes_has_no_times():
    played = play(replace(SMALL, rates=(1e-9,), burst=None), LENT, 1e-9)
    assert played.requests == () and played.tokens_s == 0 and math.isnan(played.first_s(0.5))


def test_a_prompt_that_fits_needs_no_link():
    fits = replace(SMALL, long_tokens=1_000)
    assert long_prompt_rate(fits, fits.host) == pytest.approx(1 / 1.01)
    assert long_prompt_rate(replace(fits, long_tokens=1_500), fits.host) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("memory: 8 GB", "memory: 100 MB", "a request of 3000 tokens exceeds the memory"),
        ("prompt: [50, 300]", "prompt: [50, 300000]", "a request of 300200 tokens exceeds"),
        ("seconds: 120", "seconds: 120000", "simulated"),
        ("rates: [", "rates: []  #", "at least one"),
        ("[200, 2000]", "[2000, 200]", "two numbers of tokens are expected"),
        ("[200, 2000]", "[200]", "two numbers of tokens are expected"),
        ("step_s: 0.025", "step_s: 0", "must be above 0"),
        ("  host:", "  hosts:", "unknown key 'hosts'"),
        ("long_tokens: 120000", "", "has no 'long_tokens'"),
    ],
)
def test_mistakes_are_said(tmp_path, old, new, reason):
    from dask_pcm.simulation.scenario.read import _SHIPPED

    text = (_SHIPPED / "burst.yaml").read_text()
    assert old in text
    (tmp_path / "mine.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ScenarioError, match=reason):
        read_any(str(tmp_path / "mine.yaml"))


def test_a_scenario_of_a_cluster_is_another_kind():
    with pytest.raises(ScenarioError, match="of a serving device, not of a cluster"):
        read_scenario("burst")
