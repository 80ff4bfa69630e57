"""Shows a run's progress: a bar on a terminal, a line in a notebook, log lines elsewhere.

All show the same fields; on narrow terminals, whole fields are left out.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dask_pcm.runs.progress.progress import PAUSED, Progress, span

LINE_EVERY_S = 10.0
_BAR_CHARS = 10
#: Notebooks do not tell their width.
_NOTEBOOK_CHARS = 100


class Meter(Protocol):
    """Shows progress; `note` is what the run waits for, shown in place of its rate."""

    def __enter__(self) -> Meter: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, progress: Progress, note: str = "") -> None:
        """Show the current state; may be called often."""


def meter(is_shown: bool) -> Meter:
    """The meter for what standard error is."""
    console = Console(stderr=True)
    if not is_shown:
        return _Silence()
    if console.is_jupyter:
        return _Notebook()
    if console.is_terminal and not console.is_dumb_terminal:
        return _Bar(console)
    return _Lines(console)


class _Field(NamedTuple):
    """A field of the line; fields of high rank are left out first."""

    rank: int
    text: str


def line(progress: Progress, width: int | None = None, note: str = "") -> str:
    """The progress as a line of at most `width` characters.

    >>> now = Progress("running", 450, 1_000, failed=3, per_s=110, n_warm=2, n_workers=2)
    >>> line(now)
    '450/1,000 rows, 45%, 3 failed, 110/s, ETA 5 s, 2/2 warm, 0 loads'
    >>> line(now, 80)
    '━━━━────── 450/1,000 rows, 45%, 3 failed, 110/s, ETA 5 s, 2/2 warm, 0 loads'
    >>> line(now, 40)
    '450/1,000 rows, 45%, 3 failed, ETA 5 s'
    >>> line(now, 40, "no workers: the cluster has 0")
    'no workers: the cluster has 0, 3 failed'
    """
    bar = "" if width is None else _bar(progress)
    fields = [field for field in _fields(progress, note) if field.text]
    kept: list[_Field] = []
    for field in sorted(fields):
        if width is None or len(", ".join(one.text for one in [*kept, field])) <= width:
            kept.append(field)
    text = ", ".join(field.text for field in fields if field in kept)
    return f"{bar} {text}" if width is not None and len(f"{bar} {text}") <= width else text


def _fields(progress: Progress, note: str) -> list[_Field]:
    is_paused = progress.state == PAUSED
    is_slow = is_paused or note != ""  # the rate so far says nothing about the end
    is_done = progress.done >= progress.total
    eta = "" if is_slow or is_done or progress.eta_s is None else f"ETA {span(progress.eta_s)}"
    return [
        _Field(0, "paused" if is_paused else note),
        _Field(3, f"{progress.done:,}/{progress.total:,} {progress.counted}"),
        _Field(2, f"{_percent(progress)}%"),
        _Field(1, f"{progress.failed:,} failed"),
        _Field(5, "" if is_slow else f"{progress.per_s:,.0f}/s"),
        _Field(4, eta),
        _Field(6, "" if note else _warm(progress)),
        _Field(7, f"{progress.n_loads} loads"),
    ]


def _warm(progress: Progress) -> str:
    if progress.n_workers or progress.done >= progress.total:
        return f"{progress.n_warm}/{progress.n_workers} warm"
    return "" if progress.state == PAUSED else "waiting for workers"


def _percent(progress: Progress) -> int:
    """Rounded down: 100 only at the end."""
    return 100 * progress.done // progress.total if progress.total else 100


def _bar(progress: Progress) -> str:
    n_full = _BAR_CHARS * _percent(progress) // 100
    return "━" * n_full + "─" * (_BAR_CHARS - n_full)


class _Silence:
    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *args: object) -> None: ...

    def show(self, progress: Progress, note: str = "") -> None: ...


class _Bar:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> _Bar:
        self._live.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._live.stop()

    def show(self, progress: Progress, note: str = "") -> None:
        text = line(progress, self._console.width, note)
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


class _Notebook:
    """A display of the cell that is updated in place; needs no widgets."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __enter__(self) -> _Notebook:
        return self

    def __exit__(self, *args: object) -> None: ...

    def show(self, progress: Progress, note: str = "") -> None:
        from IPython.display import display

        shown = {"text/plain": line(progress, _NOTEBOOK_CHARS, note)}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call] # IPython's own
        else:
            self._handle.update(shown, raw=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0
        self._shown: tuple[int, str, str] | None = None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *args: object) -> None: ...

    def show(self, progress: Progress, note: str = "") -> None:
        now = time.monotonic()
        new = (progress.done, progress.state, note)
        if new == self._shown or (now < self._next and progress.done < progress.total):
            return
        self._shown = new
        self._next = now + LINE_EVERY_S
        self._console.print(line(progress, note=note), highlight=False, soft_wrap=True)


class Stopwatch:
    """Seconds of running time, without pauses."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Running time so far."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def run(self, is_running: bool) -> None:
        """Start or stop; no effect if it is in that state."""
        if is_running and self._since is None:
            self._since = time.monotonic()
        elif not is_running:
            self._seconds, self._since = self.seconds, None

    def __enter__(self) -> Stopwatch:
        self.run(True)
        return self

    def __exit__(self, *args: object) -> None:
        self.run(False)
