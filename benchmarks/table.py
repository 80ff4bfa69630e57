"""Rows of measure, value, bar and ok: printed, and written as JSON."""

from __future__ import annotations

import argparse
import json
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure against its bar; `bar` is text such as "<= 1.02", or empty for none."""

    measure: str
    value: float
    bar: str
    ok: bool | None

    @classmethod
    def of(cls, measure: str, value: float, bar: str = "") -> Row:
        if not bar:
            return cls(measure, value, bar, None)
        sign, limit = bar.split()
        return cls(measure, value, bar, _HOLDS[sign](value, float(limit)))


class Rows:
    """Collects rows; shows each as it comes."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._console = Console()

    def add(self, measure: str, value: float, bar: str = "") -> None:
        row = Row.of(measure, round(float(value), 4), bar)  # numpy's numbers are no JSON
        self._rows.append(row)
        verdict = {True: "ok", False: "MISSED", None: ""}[row.ok]
        self._console.print(
            f"{measure}: {value:.4g} {bar and f'({bar})'} {verdict}", soft_wrap=True
        )

    def extend(self, rows: Sequence[Row]) -> None:
        """Rows that another process has shown."""
        self._rows.extend(rows)

    @property
    def all(self) -> Sequence[Row]:
        return tuple(self._rows)

    @property
    def n_missed(self) -> int:
        return sum(row.ok is False for row in self._rows)

    def write(self, path: str | None) -> None:
        table = RichTable("measure", "value", "bar", "ok")
        for row in self._rows:
            table.add_row(
                row.measure, f"{row.value:.4g}", row.bar, "" if row.ok is None else str(row.ok)
            )
        self._console.print(table)
        if path:
            text = json.dumps([asdict(row) for row in self._rows], indent=1)
            Path(path).write_text(text + "\n", encoding="utf-8")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", metavar="FILE", help="write rows of measure, value, bar, ok")
    return made
