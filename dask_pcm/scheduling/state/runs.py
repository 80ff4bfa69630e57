"""Open runs and the work that each of them will still submit."""

from __future__ import annotations

from dataclasses import dataclass, field

from dask_pcm.scheduling.events import Group, RunReported, Work


@dataclass(slots=True)
class ExpectedWork:
    """Work that a run has announced and not submitted yet.

    Attributes
    ----------
    n_units
        Most units that the run can submit at the same time.
    """

    group: Group
    n_rows: float
    n_units: int


@dataclass(slots=True)
class Runs:
    """Expected work of all open runs, by the name of the run."""

    by_name: dict[str, ExpectedWork] = field(default_factory=dict)

    def __contains__(self, run: str) -> bool:
        return run in self.by_name

    def report(self, event: RunReported) -> None:
        """Replace what is known of a run by its latest report."""
        self.by_name[event.run] = ExpectedWork(event.group, event.n_rows, event.n_units)

    def close(self, run: str) -> None:
        """Forget a run: it submits nothing more."""
        self.by_name.pop(run, None)

    def of_group(self, group: Group) -> list[ExpectedWork]:
        """Expected work of each run that submits to `group`."""
        return [run for run in self.by_name.values() if run.group == group]

    def expected_rows(self, group: Group) -> float:
        """Rows that runs will still submit to `group`."""
        return sum(run.n_rows for run in self.of_group(group))

    def expected_units(self, group: Group) -> int:
        """Units that runs could submit to `group` now."""
        return sum(run.n_units for run in self.of_group(group))

    def expected_groups(self) -> dict[Group, None]:
        """Groups to which some run will still submit rows, in the order of their runs."""
        return dict.fromkeys(run.group for run in self.by_name.values() if run.n_rows > 0)

    def contexts(self) -> set[str]:
        """Contexts that open runs need."""
        return {context for run in self.by_name.values() for context in run.group.contexts}

    def record_submitted(self, work: Work) -> None:
        """Subtract submitted work from what its run has announced.

        Otherwise its rows would count twice, as waiting and as expected, until the next report.
        """
        for run in self.by_name.values():
            if run.group == work.group:
                run.n_rows = max(0.0, run.n_rows - work.n_rows)
                return
