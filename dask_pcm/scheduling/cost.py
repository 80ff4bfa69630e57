"""What things cost, learned from what they took: seconds to load, seconds for a row."""

from __future__ import annotations

from dataclasses import dataclass, field

from dask_pcm.scheduling.events import Group

#: Busy seconds after which an observation counts half.
HALF_LIFE_S = 30.0


@dataclass(slots=True)
class Rate:
    """Seconds per thing: a ratio of sums in which old observations fade."""

    seconds: float = 0.0
    n: float = 0.0

    def observe(self, seconds: float, n: float) -> None:
        keep = 0.5 ** (seconds / HALF_LIFE_S)
        self.seconds = self.seconds * keep + seconds
        self.n = self.n * keep + n

    @property
    def value(self) -> float | None:
        """Seconds per thing; None before the first observation."""
        return self.seconds / self.n if self.n > 0 else None


@dataclass(slots=True)
class CostModel:
    """Learned costs by context, kind of work and worker."""

    loads: dict[str, Rate] = field(default_factory=dict)
    restores: dict[str, Rate] = field(default_factory=dict)
    rows: dict[Group, Rate] = field(default_factory=dict)
    rows_on: dict[tuple[Group, str], Rate] = field(default_factory=dict)

    def observe_warm(self, context: str, seconds: float, is_built: bool) -> None:
        """A context was warmed: built, or restored from what was left of it."""
        rates = self.loads if is_built else self.restores
        rates.setdefault(context, Rate()).observe(seconds, 1.0)

    def observe_rows(self, group: Group, worker: str, seconds: float, n_rows: float) -> None:
        self.rows.setdefault(group, Rate()).observe(seconds, n_rows)
        self.rows_on.setdefault((group, worker), Rate()).observe(seconds, n_rows)

    def load_s(self, context: str) -> float:
        """Seconds to build a context; 0 if that was never seen."""
        rate = self.loads.get(context)
        return (rate.value if rate else None) or 0.0

    def restore_s(self, context: str) -> float:
        """Seconds to restore it from the rung below; before that was seen, as to build it."""
        rate = self.restores.get(context)
        return (rate.value if rate else None) or self.load_s(context)

    def row_s(self, group: Group, worker: str) -> float | None:
        """Seconds a row of `group` takes on `worker`; where it is new there, the group's mean."""
        for rate in (self.rows_on.get((group, worker)), self.rows.get(group)):
            if rate is not None and rate.value is not None:
                return rate.value
        return None

    def forget_worker(self, worker: str) -> None:
        for key in [key for key in self.rows_on if key[1] == worker]:
            del self.rows_on[key]
