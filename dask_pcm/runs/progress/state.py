"""How a run stands, in the process that drives it."""

from __future__ import annotations

from dask_pcm.runs.gate_link import GateStatus
from dask_pcm.runs.progress.meter import Stopwatch
from dask_pcm.runs.progress.progress import PAUSED, RUNNING, Progress
from dask_pcm.runs.progress.report import Report


class RunState:
    """What is known of a run so far: written by the thread that drives it, read by any.

    Attributes
    ----------
    n_total, counted
        Rows of the job, or parts where rows are not known; and which of them (``rows``, ``parts``).
    n_done
        Those that are committed, by this run or an earlier one.
    lack
        What the run cannot go on without, in words; "" if nothing.
    gate
        What the gate reported last.
    has_committed
        Whether this run has committed a part: then what it overwrites is not put back.
    """

    def __init__(self, run: str, n_total: int, counted: str) -> None:
        self.n_total = n_total
        self.counted = counted
        self.report = Report(run=run)
        self.clock = Stopwatch()
        self.n_done = 0
        self.is_paused = False
        self.has_committed = False
        self.lack = ""
        self.gate = GateStatus()
        self._n_resumed = 0
        self._first_gate: GateStatus | None = None

    @property
    def progress(self) -> Progress:
        """How far the run is; rates leave out what earlier runs have done."""
        report = self.report
        is_paused = self.is_paused and report.state == RUNNING
        return Progress(
            PAUSED if is_paused else report.state,
            self.n_done,
            self.n_total,
            self.counted,
            report.rows_failed,
            (self.n_done - self._n_resumed) / max(1e-3, self.clock.seconds),
            self.gate.n_warm,
            self.gate.n_workers,
            report.context_loads,
            self.lack,
        )

    def begin(self, n_resumed: int) -> None:
        """Start running; `n_resumed` rows (or parts) are done already."""
        self.n_done = self._n_resumed = n_resumed
        self.report.state = RUNNING

    def note_gate(self, gate: GateStatus) -> None:
        """Take in a report of the gate; loads count from its first one on."""
        first = self._first_gate = self._first_gate or gate
        self.gate = gate
        self.report.context_loads = gate.n_loads - first.n_loads
        self.report.load_s = gate.load_s - first.load_s
        self.report.workers = max(self.report.workers, gate.n_workers)
