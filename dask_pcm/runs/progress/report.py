"""The figures of a run, and the count of rows that it computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dask_pcm.ledger.decode import known_fields
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Range, Ranges
from dask_pcm.runs.progress.progress import STARTING


@dataclass(slots=True)
class Report:
    """Figures of a run; rows and units of earlier runs of the same job are counted in `rows`,
    `rows_failed` and the fields ending in ``_resumed``, and nowhere else.

    Attributes
    ----------
    run
        Identity of the run.
    state, error
        How the run ended: ``finished``, ``failed`` or ``cancelled``, and why; or ``starting`` or
        ``running``.
    rows, rows_failed
        Rows of the whole output, and those among them with an error.
    rows_recomputed
        Rows that functions were called on now although they had been before, in this run or an
        earlier one: to the row where the output is in a folder, to the unit in an object store.
    rows_retried
        Rows that had failed and were computed again (``retry_failed``).
    units, units_resumed, rows_resumed
        Units committed now; units and rows found committed.
    context_loads, load_s
        Times that a context was built, on any worker, and the seconds that took in total.
    workers
        The most workers seen at once.
    total_s, infer_s
        Wall time, and seconds that contexts were held, summed over workers.
    rows_per_s
        Rows computed now over wall time.
    ran_on
        Rows by the device and dtype that they were computed with.
    committed_by
        How the first writer of a part wins in this output.
    errors
        A sample of the rows' errors.
    """

    run: str = ""
    state: str = STARTING
    error: str | None = None
    rows: int = 0
    rows_failed: int = 0
    rows_recomputed: int = 0
    rows_retried: int = 0
    units: int = 0
    units_resumed: int = 0
    rows_resumed: int = 0
    context_loads: int = 0
    workers: int = 0
    total_s: float = 0.0
    load_s: float = 0.0
    infer_s: float = 0.0
    rows_per_s: float = 0.0
    ran_on: dict[str, int] = field(default_factory=dict)
    committed_by: str = ""
    errors: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The main figures, in one line."""
        return (
            f"{self.rows:,} rows, {self.rows_failed:,} failed, {self.rows_resumed:,} resumed,"
            f" {self.rows_per_s:,.0f} rows/s, {self.context_loads} loads"
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Report:
        """From a report file; unknown or damaged fields of other versions are left out."""
        return cls(**known_fields(cls, found))


def rows_recomputed(
    lines: Iterable[Mapping[str, Any]], run: str, part_rows: Callable[[str], int]
) -> int:
    """Rows that `run` computed and that had been computed before, by it or by another run.

    Runs cut their units differently, so ranges of rows are compared, not names. A unit that is a
    whole partition counts the rows of its part (`part_rows`).
    """
    edges: list[tuple[int, bool, int]] = []  # row, whether `run` did it, one more or one less
    journals: dict[Any, tuple[bool, list[Range]]] = {}
    partitions: Counter[str] = Counter()
    restarted: Counter[str] = Counter()
    for number, line in enumerate(lines):
        is_mine = line["run"] == run
        if "called" in line:  # several may tell of one journal
            _, rows = journals.setdefault(line["journal"] or number, (is_mine, []))
            rows += [(start, stop) for start, stop in line["called"]]
        elif isinstance(place := parse_name(line.get("start", "")), int):
            partitions[line["start"]] += 1
            restarted[line["start"]] += is_mine
        elif place is not None:
            journals[number] = is_mine, [place]
    for is_mine, rows in journals.values():
        for start, stop in Ranges(rows):
            edges += [(start, is_mine, 1), (stop, is_mine, -1)]
    n_rows = _again(sorted(edges))
    for name, n_mine in restarted.items():
        n_again = n_mine if partitions[name] > n_mine else n_mine - 1
        n_rows += max(0, n_again) * (part_rows(name) if n_again > 0 else 0)
    return n_rows


def _again(edges: Sequence[tuple[int, bool, int]]) -> int:
    """Rows times the calls on them by one run, without each row's first call ever."""
    total = n_mine = n_others = at = 0
    for row, is_mine, change in edges:
        total += (row - at) * max(0, n_mine - (n_others <= 0))
        at = row
        if is_mine:
            n_mine += change
        else:
            n_others += change
    return total
