"""Learned costs: seconds to stage a context, to load it, to restore it, and per row.

Costs are kept per device model. A cost not seen on a model is taken from the most similar model,
scaled by the ratio of the two in other work; one seen nowhere is estimated from bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

#: Busy seconds after which the weight of an observation has halved.
HALF_LIFE_S = 30.0
#: Bytes per second of staging and of loading, before any have been observed.
STAGE_BYTES_S, LOAD_BYTES_S = 200e6, 1e9

#: Work of the same cost: the contexts of a task, and its key prefix.
Kind: TypeAlias = tuple[tuple[str, ...], str]


@dataclass(slots=True)
class Rate:
    """Seconds per item, as a ratio of exponentially decaying sums.

    The first call on a worker also compiles kernels, warms caches and fills memory pools. It
    counts only until there is another observation.
    """

    seconds: float = 0.0
    n: float = 0.0
    is_first: bool = True

    def observe(self, seconds: float, n: float, is_first: bool = False) -> None:
        """Add an observation: `n` items took `seconds` seconds."""
        if is_first and not self.is_first:
            return
        is_over = self.is_first and not is_first
        keep = 0.0 if is_over else 0.5 ** (seconds / HALF_LIFE_S)
        self.seconds = self.seconds * keep + seconds
        self.n = self.n * keep + n
        self.is_first = is_first

    @property
    def value(self) -> float | None:
        """Seconds per item; None before the first observation."""
        return self.seconds / self.n if self.n > 0 else None


@dataclass(slots=True)
class ByDevice:
    """One cost, per device model."""

    rates: dict[str, Rate] = field(default_factory=dict)

    def observe(self, device: str, seconds: float, n: float, is_first: bool = False) -> bool:
        """Add an observation on a device model; return whether it is the first on that model."""
        is_new = device not in self.rates
        self.rates.setdefault(device, Rate()).observe(seconds, n, is_first)
        return is_new

    def on(self, device: str) -> float | None:
        """Seconds per item on a device model; None before the first observation there."""
        rate = self.rates.get(device)
        return rate.value if rate else None


@dataclass(slots=True)
class CostModel:
    """Learned costs by context, kind of work, device model and worker; all in seconds."""

    loads: dict[str, ByDevice] = field(default_factory=dict)
    restores: dict[str, ByDevice] = field(default_factory=dict)
    stages: dict[str, Rate] = field(default_factory=dict)
    rows: dict[Kind, ByDevice] = field(default_factory=dict)
    rows_on: dict[str, dict[Kind, Rate]] = field(default_factory=dict)
    #: Seconds per byte over all contexts.
    staged_bytes: Rate = field(default_factory=Rate)
    loaded_bytes: ByDevice = field(default_factory=ByDevice)
    #: Costs derived from other devices; cleared when a device is observed for the first time.
    _guessed: dict[tuple[Kind, str], float | None] = field(default_factory=dict)

    # -- observations ---------------------------------------------------------------------------

    def observe_staged(self, context: str, seconds: float, n_bytes: int) -> None:
        """Learn from files of a context, `n_bytes` in all, that were staged to a host."""
        self.stages.setdefault(context, Rate()).observe(seconds, 1.0)
        if n_bytes:
            self.staged_bytes.observe(seconds, n_bytes)

    def observe_warm(
        self, context: str, device: str, seconds: float, is_built: bool, n_bytes: int = 0
    ) -> None:
        """Learn from a context of `n_bytes` device bytes that was built or restored."""
        costs = self.loads if is_built else self.restores
        costs.setdefault(context, ByDevice()).observe(device, seconds, 1.0)
        if is_built and n_bytes:
            self.loaded_bytes.observe(device, seconds, n_bytes)

    def observe_rows(
        self, kind: Kind, worker: str, device: str, seconds: float, n_rows: float
    ) -> None:
        """Learn from rows finished on a worker; the first call of a kind there is kept apart."""
        own = self.rows_on.setdefault(worker, {})
        is_first = kind not in own
        own.setdefault(kind, Rate()).observe(seconds, n_rows, is_first)
        if self.rows.setdefault(kind, ByDevice()).observe(device, seconds, n_rows, is_first):
            self._guessed.clear()

    def forget_worker(self, worker: str) -> None:
        """Forget a worker's own rates; what it taught about its device model stays."""
        self.rows_on.pop(worker, None)

    # -- estimates ------------------------------------------------------------------------------

    def has_loaded(self, context: str) -> bool:
        """Whether a context has ever been built, on any worker."""
        return context in self.loads

    def stage_s(self, context: str, n_bytes: int = 0) -> float:
        """Estimated seconds to stage a context's files of `n_bytes` bytes to a new host."""
        rate = self.stages.get(context)
        if rate is not None and rate.value is not None:
            return rate.value
        return n_bytes * (self.staged_bytes.value or 1 / STAGE_BYTES_S)

    def load_s(self, context: str, device: str = "", n_bytes: int = 0) -> float:
        """Estimated seconds to build a context whose files are staged; 0 if nothing is known."""
        seen = self.loads.get(context)
        if seen is not None:
            return _like(seen, device) or 0.0
        return n_bytes * (_like(self.loaded_bytes, device) or 1 / LOAD_BYTES_S)

    def restore_s(self, context: str, device: str = "", n_bytes: int = 0) -> float:
        """Estimated seconds to restore a context from host memory; until observed, as to build."""
        seen = self.restores.get(context)
        if seen is not None:
            return _like(seen, device) or 0.0
        return self.load_s(context, device, n_bytes)

    def row_s(self, kind: Kind, worker: str, device: str = "") -> float | None:
        """Estimated seconds per row on a worker of a device model; None if nothing is known.

        In order of preference: the worker's own rate, its device model's, the worker's first
        call, the device model's first call, and a similar device model.
        """
        own = self.rows_on.get(worker)
        mine = own.get(kind) if own else None
        if mine is not None and not mine.is_first:
            return mine.value
        seen = self.rows.get(kind)
        if seen is None:
            return None
        rate = seen.rates.get(device)
        if rate is not None and not rate.is_first:
            return rate.value
        if mine is not None:
            return mine.value
        return rate.value if rate is not None else self._guess(kind, device)

    def _guess(self, kind: Kind, device: str) -> float | None:
        """Cached estimate from the most similar device model."""
        if (kind, device) not in self._guessed:
            self._guessed[kind, device] = self._derive(kind, device)
        return self._guessed[kind, device]

    def _derive(self, kind: Kind, device: str) -> float | None:
        """The most similar model's cost, scaled by the geometric mean ratio in other work.

        Models with a ratio to `device` take precedence over those known by name only.
        """
        known = {name: r.value for name, r in self.rows[kind].rates.items() if r.value is not None}
        if not known:
            return None
        logs = {other: list(self._compared(device, other)) for other in known}
        measured = [other for other in known if logs[other]]
        nearest = _most_like(device, measured or list(known))
        scale = math.exp(sum(logs[nearest]) / len(logs[nearest])) if logs[nearest] else 1.0
        return known[nearest] * scale

    def _compared(self, device: str, other: str) -> Iterator[float]:
        """Logarithm of the cost ratio between two devices, for each kind of work seen on both."""
        for costs in self.rows.values():
            here, there = costs.on(device), costs.on(other)
            if here and there:
                yield math.log(here / there)


def _like(costs: ByDevice, device: str) -> float | None:
    """The cost on a device model, or else on the most similar one."""
    own = costs.on(device)
    if own is not None:
        return own
    return costs.on(_most_like(device, list(costs.rates))) if costs.rates else None


def _most_like(device: str, others: list[str]) -> str:
    """The device model whose name shares the most words with `device`; ties by name."""
    words = _words(device)
    return max(others, key=lambda other: (len(words & _words(other)), other))


def _words(name: str) -> set[str]:
    """Words and numbers in the name of a device model, in lower case."""
    return set(re.findall(r"[a-z]+|\d+", name.lower()))
