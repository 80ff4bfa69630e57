"""How a run is going: a bar on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0


class Meter(Protocol):
    """Shows rows done; `note` says how the cluster stands."""

    def __enter__(self) -> Meter: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, n_done: int, per_s: float, note: str) -> None: ...


def meter(n_total: int, n_before: int, unit: str, is_shown: bool) -> Meter:
    """The meter that fits where we are writing to (standard error)."""
    console = Console(stderr=True)
    if not is_shown:
        return _Silence()
    if console.is_terminal or console.is_jupyter:
        return _Bar(console, n_total, n_before, unit)
    return _Lines(console, n_total, unit)


class _Silence:
    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *args: object) -> None: ...

    def show(self, n_done: int, per_s: float, note: str) -> None: ...


class _Bar:
    def __init__(self, console: Console, n_total: int, n_before: int, unit: str) -> None:
        # Fits a terminal of 80 columns, so that nothing is cut in the middle.
        self._progress = Progress(
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._progress.add_task(
            "run", total=n_total, completed=n_before, rate="", note=""
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._progress.stop()

    def show(self, n_done: int, per_s: float, note: str) -> None:
        self._progress.update(self._task, completed=n_done, rate=f"{per_s:,.0f}/s", note=note)


class _Lines:
    def __init__(self, console: Console, n_total: int, unit: str) -> None:
        self._console = console
        self._n_total = n_total
        self._unit = unit
        self._next = 0.0
        self._shown = (-1, "")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *args: object) -> None: ...

    def show(self, n_done: int, per_s: float, note: str) -> None:
        now = time.monotonic()
        if (n_done, note) == self._shown or (now < self._next and n_done < self._n_total):
            return
        self._shown = (n_done, note)
        self._next = now + LINE_EVERY_S
        left_s = (self._n_total - n_done) / per_s if per_s else float("nan")
        eta = f"ETA {left_s:.0f} s, " if left_s == left_s and n_done < self._n_total else ""
        text = f"{n_done:,}/{self._n_total:,} {self._unit}, {per_s:,.0f}/s, {eta}{note}"
        self._console.print(text, highlight=False, soft_wrap=True)


class Stopwatch:
    """Seconds that something has been under way, pauses left out."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def run(self, is_running: bool) -> None:
        """Go on, or stop; nothing if it does already."""
        if is_running and self._since is None:
            self._since = time.monotonic()
        elif not is_running:
            self._seconds, self._since = self.seconds, None

    def __enter__(self) -> Stopwatch:
        self.run(True)
        return self

    def __exit__(self, *args: object) -> None:
        self.run(False)
