"""What things cost, learned from what they took: seconds to stage, to load, for a row.

Costs are kept by device model. What has not been seen on one is taken from the model most like it,
scaled by how the two compare in other work; what has been seen nowhere, from its bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

#: Busy seconds after which an observation counts half.
HALF_LIFE_S = 30.0
#: Bytes a second of staging, and of loading onto a device, before any have been seen.
STAGE_BYTES_S, LOAD_BYTES_S = 200e6, 1e9

#: Contexts of a task, and its key prefix: what costs alike.
Kind: TypeAlias = tuple[tuple[str, ...], str]


@dataclass(slots=True)
class Rate:
    """Seconds per thing: a ratio of sums in which old observations fade.

    The first call on a worker also compiles, warms caches and fills pools. It counts for as long
    as nothing else is known.
    """

    seconds: float = 0.0
    n: float = 0.0
    is_first: bool = True

    def observe(self, seconds: float, n: float, is_first: bool = False) -> None:
        if is_first and not self.is_first:
            return
        is_over = self.is_first and not is_first
        keep = 0.0 if is_over else 0.5 ** (seconds / HALF_LIFE_S)
        self.seconds = self.seconds * keep + seconds
        self.n = self.n * keep + n
        self.is_first = is_first

    @property
    def value(self) -> float | None:
        """Seconds per thing; None before the first observation."""
        return self.seconds / self.n if self.n > 0 else None


@dataclass(slots=True)
class ByDevice:
    """One cost on each device model."""

    rates: dict[str, Rate] = field(default_factory=dict)

    def observe(self, device: str, seconds: float, n: float, is_first: bool = False) -> bool:
        """Take in what `n` things have taken; answered with whether the device is new."""
        is_new = device not in self.rates
        self.rates.setdefault(device, Rate()).observe(seconds, n, is_first)
        return is_new

    def on(self, device: str) -> float | None:
        rate = self.rates.get(device)
        return rate.value if rate else None


@dataclass(slots=True)
class CostModel:
    """Learned costs by context, kind of work, device model and worker."""

    loads: dict[str, ByDevice] = field(default_factory=dict)
    restores: dict[str, ByDevice] = field(default_factory=dict)
    stages: dict[str, Rate] = field(default_factory=dict)
    rows: dict[Kind, ByDevice] = field(default_factory=dict)
    rows_on: dict[str, dict[Kind, Rate]] = field(default_factory=dict)
    #: Seconds a byte, whatever the context.
    staged_bytes: Rate = field(default_factory=Rate)
    loaded_bytes: ByDevice = field(default_factory=ByDevice)
    #: What was taken from another device, until one is seen for the first time.
    _guessed: dict[tuple[Kind, str], float | None] = field(default_factory=dict)

    # -- what was seen --------------------------------------------------------------------------

    def observe_staged(self, context: str, seconds: float, n_bytes: int) -> None:
        """The files of a context have come to a host, from elsewhere."""
        self.stages.setdefault(context, Rate()).observe(seconds, 1.0)
        if n_bytes:
            self.staged_bytes.observe(seconds, n_bytes)

    def observe_warm(
        self, context: str, device: str, seconds: float, is_built: bool, n_bytes: int = 0
    ) -> None:
        """A context was warmed: built, or restored from what was left of it."""
        costs = self.loads if is_built else self.restores
        costs.setdefault(context, ByDevice()).observe(device, seconds, 1.0)
        if is_built and n_bytes:
            self.loaded_bytes.observe(device, seconds, n_bytes)

    def observe_rows(
        self, kind: Kind, worker: str, device: str, seconds: float, n_rows: float
    ) -> None:
        """Rows have been done on a worker; the first of a kind there are told apart."""
        own = self.rows_on.setdefault(worker, {})
        is_first = kind not in own
        own.setdefault(kind, Rate()).observe(seconds, n_rows, is_first)
        if self.rows.setdefault(kind, ByDevice()).observe(device, seconds, n_rows, is_first):
            self._guessed.clear()

    def forget_worker(self, worker: str) -> None:
        self.rows_on.pop(worker, None)

    # -- what is expected -----------------------------------------------------------------------

    def has_loaded(self, context: str) -> bool:
        """Whether a context has been built anywhere."""
        return context in self.loads

    def stage_s(self, context: str, n_bytes: int = 0) -> float:
        """Seconds to bring the files of a context to a host that has none of them."""
        rate = self.stages.get(context)
        if rate is not None and rate.value is not None:
            return rate.value
        return n_bytes * (self.staged_bytes.value or 1 / STAGE_BYTES_S)

    def load_s(self, context: str, device: str = "", n_bytes: int = 0) -> float:
        """Seconds to build a context whose files are there; 0 if nothing is known of it."""
        seen = self.loads.get(context)
        if seen is not None:
            return _like(seen, device) or 0.0
        return n_bytes * (_like(self.loaded_bytes, device) or 1 / LOAD_BYTES_S)

    def restore_s(self, context: str, device: str = "", n_bytes: int = 0) -> float:
        """Seconds to restore it from the rung below; before that was seen, as to build it."""
        seen = self.restores.get(context)
        if seen is not None:
            return _like(seen, device) or 0.0
        return self.load_s(context, device, n_bytes)

    def row_s(self, kind: Kind, worker: str, device: str = "") -> float | None:
        """Seconds that a row takes on a worker, of a device model; None if nothing is known."""
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
        """From the device most like it; scaled by how both compare in other kinds of work."""
        if (kind, device) not in self._guessed:
            self._guessed[kind, device] = self._from_kin(kind, device)
        return self._guessed[kind, device]

    def _from_kin(self, kind: Kind, device: str) -> float | None:
        known = {name: r.value for name, r in self.rows[kind].rates.items() if r.value is not None}
        if not known:
            return None
        logs = {other: list(self._compared(device, other)) for other in known}
        measured = [other for other in known if logs[other]]
        kin = _most_like(device, measured or list(known))
        scale = math.exp(sum(logs[kin]) / len(logs[kin])) if logs[kin] else 1.0
        return known[kin] * scale

    def _compared(self, device: str, other: str) -> Iterator[float]:
        """Logarithms of how much longer kinds of work take on a device than on another."""
        for costs in self.rows.values():
            here, there = costs.on(device), costs.on(other)
            if here and there:
                yield math.log(here / there)


def _like(costs: ByDevice, device: str) -> float | None:
    """What it takes on a device, or on the one most like it."""
    own = costs.on(device)
    if own is not None:
        return own
    return costs.on(_most_like(device, list(costs.rates))) if costs.rates else None


def _most_like(device: str, others: list[str]) -> str:
    """The device model whose name has most words in common with another's."""
    words = _words(device)
    return max(others, key=lambda other: (len(words & _words(other)), other))


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", name.lower()))
