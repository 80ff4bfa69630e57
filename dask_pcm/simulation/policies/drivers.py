"""The drivers of all simulated runs: each opens, reports its work, feeds units, and closes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from dask_pcm.config import Config
from dask_pcm.scheduling.events import Event, Group, RunClosed, RunReported, Work, WorkParked
from dask_pcm.scheduling.feed.feed import DeviceDemand
from dask_pcm.simulation.policies.window import SimulatedUnit, SimulatedWindow
from dask_pcm.simulation.scenario.scenario import RunSpec
from dask_pcm.simulation.world.clock import Clock

#: Interval at which a run reports its remaining work to the gate, in seconds (``runs/driver.py``).
_POLL_S = 0.25


class Drivers:
    """The client side of all runs of a scenario.

    Parameters
    ----------
    apply
        Tells the gate an event.
    demand
        Returns the workers that the gate has for a group, by device model.
    """

    def __init__(
        self,
        clock: Clock,
        config: Config,
        apply: Callable[[Event], None],
        demand: Callable[[Group], Sequence[DeviceDemand]],
    ) -> None:
        self._clock = clock
        self._config = config
        self._apply = apply
        self._demand = demand
        self._windows: dict[str, SimulatedWindow] = {}
        self._n_to_come = 0

    @property
    def is_busy(self) -> bool:
        """Whether a run is open."""
        return bool(self._windows)

    @property
    def is_done(self) -> bool:
        """Whether all runs have started and ended."""
        return not self._n_to_come and not self._windows

    def schedule(self, runs: Sequence[RunSpec]) -> None:
        """Schedule the start of each run."""
        self._n_to_come = len(runs)
        for run in runs:
            self._clock.at(run.starts_s, functools.partial(self._open, run))

    def unit(self, key: object) -> SimulatedUnit:
        """The outstanding unit of a key."""
        assert isinstance(key, tuple)
        return self._windows[key[0]].units[key]

    def park(self, units: Sequence[SimulatedUnit], is_again: bool = False) -> None:
        """Submit units, or submit them again."""
        for unit in units:
            # As in Dask: user priority, then submission order. Only runs declare rows.
            priority = (-unit.run.priority, unit.run.starts_s, float(unit.number))
            n_rows = float(max(1, unit.n_rows)) if unit.run.is_run else 1.0
            work = Work(unit.key, _group(unit.run), priority, n_rows, unit.cut_for, is_again)
            self._apply(WorkParked(work))

    def resubmit(self, unit: SimulatedUnit, n_kept: int) -> None:
        """A unit was lost with its worker; `n_kept` of its rows are in its journal."""
        self._windows[unit.run.name].shrink(unit, n_kept)
        self.park([unit], is_again=True)

    def collect(self, unit: SimulatedUnit, seconds: float) -> None:
        """A unit was committed after `seconds` of inference: submit what comes next."""
        window = self._windows[unit.run.name]
        window.ended(unit.key, seconds)
        self._feed(window)

    def give_up(self, unit: SimulatedUnit) -> None:
        """A unit has failed for good."""
        window = self._windows[unit.run.name]
        window.failed(unit.key)
        self._feed(window)

    def _open(self, run: RunSpec) -> None:
        self._n_to_come -= 1
        window = self._windows[run.name] = SimulatedWindow(run, self._config)
        if not run.is_run:
            self.park(window.pieces())
            return
        # While the output is being listed, only the number of pieces is known.
        n_pieces = -(-run.n_rows // run.task_rows)
        self._apply(RunReported(run.name, _group(run), float(n_pieces), n_pieces))
        self._poll(window)

    def _poll(self, window: SimulatedWindow) -> None:
        """Report what is left, and take in what the gate has for it."""
        run = window.run
        if run.name in self._windows:
            n_units = max(1, len(window.units))
            self._apply(RunReported(run.name, _group(run), float(window.n_uncut), n_units))
            window.update_demand(self._demand(_group(run)))
            self._feed(window)
            self._clock.after(_POLL_S, lambda: self._poll(window))

    def _feed(self, window: SimulatedWindow) -> None:
        if window.run.is_run:
            self.park(window.feed())
        if window.is_empty and window.run.name in self._windows:
            del self._windows[window.run.name]
            self._apply(RunClosed(window.run.name))


def _group(run: RunSpec) -> Group:
    """The group of a run's work: a run has one kind of task."""
    return Group(run.contexts, run.name)
