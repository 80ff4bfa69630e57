"""Steps grow while that makes them faster, and shrink where memory ends."""

from __future__ import annotations

import random

import pytest

from dask_pcm.inference.engine.capacity import Capacity


class Device:
    """Takes `fixed_s` a step and a second for `rate` tokens; memory for `most` tokens."""

    def __init__(self, fixed_s, rate, most=10**9, noise=0.0):
        self.fixed_s, self.rate, self.most, self.noise = fixed_s, rate, most, noise
        self.random = random.Random(0)
        self.n_failed = 0
        self.n_tokens = self.took_s = 0

    def run(self, capacity, n_steps):
        for _ in range(n_steps):
            tokens = capacity.tokens
            if tokens > self.most:
                self.n_failed += 1
                capacity.fail(tokens)
                self.took_s += self.fixed_s
                continue
            seconds = self.fixed_s + tokens / self.rate
            seconds *= 1 + self.noise * self.random.random()
            capacity.observe(tokens, seconds)
            self.n_tokens += tokens
            self.took_s += seconds
        return self.n_tokens / self.took_s


@pytest.mark.parametrize(
    ("fixed_s", "rate"),
    [(0.01, 100_000), (0.03, 50_000), (0.001, 2_000), (0.0, 1_000)],
)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_throughput_is_near_that_of_the_best_fixed_size(fixed_s, rate, noise):
    best = max(
        Device(fixed_s, rate, noise=noise).run(Capacity(2**k, most=2**k), 100) for k in range(8, 14)
    )
    capacity = Capacity(512, most=8192)
    device = Device(fixed_s, rate, noise=noise)
    device.run(capacity, 60)  # what it takes to find out
    device.n_tokens = device.took_s = 0
    assert device.run(capacity, 1000) >= 0.85 * best


def test_a_size_that_makes_nothing_faster_is_left_again():
    capacity = Capacity(512, most=8192)
    Device(0.0, 1_000).run(capacity, 50)
    assert capacity.tokens == 512


def test_failures_become_rare():
    capacity = Capacity(512, most=1 << 16)
    device = Device(0.01, 100_000, most=3_000)
    device.run(capacity, 2_000)
    assert device.n_failed <= 20 and 2_400 <= capacity.tokens <= 3_000


def test_steps_are_never_smaller_than_the_least():
    capacity = Capacity(512, most=8192, least=32)
    for _ in range(200):
        capacity.fail(capacity.tokens)
    assert capacity.tokens == 32
