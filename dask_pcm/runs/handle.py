"""``Run``: a handle on a run, in the process that drives it and in any other."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from dask_pcm.errors import CancelledError, OutputError, PCMError, redacted
from dask_pcm.ledger.layout import CANCEL, HOME, PAUSE, REPORT
from dask_pcm.ledger.output import Output, local_path
from dask_pcm.ledger.parts import parse_name
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.ledger.status import (
    CANCELLED,
    FINISHED,
    INTERRUPTED,
    PAUSED,
    RUNNING,
    STARTING,
    Progress,
    Writer,
)
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.ledger.takeover import other_runs, read_driver
from dask_pcm.runs.identity import Manifest
from dask_pcm.runs.progress.report import Report

_POLL_S = 0.5


class Drives(Protocol):
    """What a run asks of the driver in its own process."""

    report: Report

    @property
    def progress(self) -> Progress: ...


class Run:
    """A run of a job: what ``write_parquet`` returns, and ``attach`` finds.

    All of it may be called from any thread, and works in the process that drives the run as in
    any other that sees the output.
    """

    def __init__(self, output: Output, driver: Drives | None = None) -> None:
        self._output = output
        self._driver = driver
        self._seen: Progress | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def path(self) -> str:
        """The output."""
        return self._output.path

    @property
    def status(self) -> str:
        """``starting``, ``running``, ``paused``, ``finished``, ``failed``, ``cancelled`` or
        ``interrupted``."""
        return self.progress.state

    @property
    def progress(self) -> Progress:
        """How far it is; see ``Progress``."""
        self._seen = self._driver.progress if self._driver is not None else self._look()
        return self._seen

    def _look(self) -> Progress:
        """How far a run of another process is, from what it has written."""
        owner = self._owner()
        if owner is None or (not owner.is_alive and self._has_reported(owner.run)):
            return self._of_ended()
        found = self._output.read_told(f"{HOME}/run-{owner.run}/status.json") or {}
        if owner.is_alive:
            return Progress.of(found) if "state" in found else self._counted({}, STARTING)
        return self._counted(found, INTERRUPTED)

    @property
    def report(self) -> Report:
        """What came out of it so far; see ``Report``."""
        if self._driver is not None:
            return self._driver.report
        found = None if self.driver else self._output.read_told(REPORT)
        if found:
            return Report.of(found)
        progress = self.progress
        is_counted = progress.counted == "rows"
        rows = progress.done if is_counted else 0
        return Report(state=progress.state, rows=rows, rows_failed=progress.failed)

    @property
    def driver(self) -> str:
        """Who drives it: run, process, user and host; empty if nobody does."""
        owner = self._owner()
        return str(owner) if owner is not None and owner.is_alive else ""

    def pause(self) -> None:
        """Begin no more units, until ``resume``; those that workers have are finished."""
        self._wish(PAUSE)

    def resume(self) -> None:
        """Go on after ``pause``."""
        output = self._required()
        output.storage.remove(f"{output.run_dir}/{PAUSE}")

    def cancel(self) -> None:
        """End it: what is committed stays, and the same job can be resumed."""
        self._wish(CANCEL)

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until it has ended, and return its report.

        Parameters
        ----------
        timeout
            Seconds to wait at most; for ever if left out.

        Raises
        ------
        TimeoutError
            Where it has not ended by then; it goes on.
        PCMError
            Why it failed, or that it was cancelled or its driver died; in the process that drives
            it, whatever error ended it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"The run of {self.path!r} goes on: {self.progress}")
        elif self._driver is None:
            while (progress := self.progress).state in (STARTING, RUNNING, PAUSED):
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"The run of {self.path!r} goes on: {progress}")
                time.sleep(_POLL_S)
            self._raise_for(progress)
        if self._error is not None:
            raise self._error
        return self.report

    def _raise_for(self, progress: Progress) -> None:
        if progress.state == FINISHED:
            return
        if progress.state == INTERRUPTED:
            raise PCMError(
                f"Whoever drove the run of {self.path!r} is gone ({progress}). Run the same again"
                " to go on."
            )
        kind = CancelledError if progress.state == CANCELLED else PCMError
        raise kind(self.report.error or f"The run of {self.path!r} {progress.state}.")

    def _owner(self) -> Writer | None:
        """Who drives the output, or drove it and died."""
        owners = other_runs(self._output)
        driver_json = f"{self._output.run_dir}/driver.json"
        if self._driver is not None and self._output.storage.exists(driver_json):
            says = read_driver(self._output, self._output.run) or {}
            owners.append(Writer(self._output.run, says, True))
        return max(owners, key=lambda owner: owner.is_alive, default=None)

    def _at_work(self) -> Output | None:
        """The output as the run at work sees it."""
        owner = self._owner()
        if owner is None or not owner.is_alive:
            return None
        return self._output.as_run(owner.run)

    def _required(self) -> Output:
        output = self._at_work()
        if output is None:
            raise OutputError(
                f"Nobody is at work on {self.path!r} ({self.progress}). To go on with it, run the"
                " same job again."
            )
        return output

    def _wish(self, what: str) -> None:
        output = self._required()
        output.storage.write(f"{output.run_dir}/{what}", b"")

    def _has_reported(self, run: str) -> bool:
        return (self._output.read_told(REPORT) or {}).get("run") == run

    def _of_ended(self) -> Progress:
        found = self._output.read_told(REPORT)
        if not found:
            return self._counted({}, INTERRUPTED)
        report = Report.of({"state": FINISHED, **found})
        counts = {"failed": report.rows_failed, "per_s": report.rows_per_s}
        return self._counted(counts, report.state)

    def _counted(self, found: Mapping[str, Any], state: str) -> Progress:
        """From the names of the parts, whatever became of the run."""
        manifest = Manifest.read(self._output)
        recorded = manifest.recorded if manifest is not None else {}
        places = [parse_name(name) for name in self._output.parts()]
        done = Ranges(place for place in places if isinstance(place, tuple)).n_rows
        done += sum(isinstance(place, int) for place in places)
        total = recorded.get("total", done)
        counts = {"total": total, "counted": recorded.get("counted", "rows")}
        return Progress.of({**counts, **found}, state=state, done=min(done, total))

    def __repr__(self) -> str:
        """How it is doing; of a run of another process, as it was when last looked at.

        No I/O: notebooks and debuggers call it at any moment, and a store may not answer.
        """
        if self._driver is not None and self._driver.progress.state == FINISHED:
            return f"<Run {redacted(self.path)!r}: {self._driver.report.summary}>"
        progress = self._seen if self._driver is None else self._driver.progress
        return f"<Run {redacted(self.path)!r}{'' if progress is None else f': {progress}'}>"


def attach(path: str | os.PathLike[str]) -> Run:
    """Look at a run from any process that sees its output, whether it is at work or has ended.

    Parameters
    ----------
    path
        The output folder, or its URL.

    Returns
    -------
    Run
        With which it can be waited for, paused and cancelled, too.

    Raises
    ------
    OutputError
        Where there is no output of ours.
    """
    output = output_to_look_at(path)
    if Manifest.read(output) is None and not other_runs(output):
        raise OutputError(
            f"There is no output of dask_pcm at {output.path!r}: it has no manifest. Give the"
            " folder that was given to write_parquet or dask-pcm run."
        )
    run = Run(output)
    run.progress  # noqa: B018 # what its repr shows from now on
    return run


def output_to_look_at(path: str | os.PathLike[str]) -> Output:
    """An output that is only read."""
    local = local_path(path)
    run = uuid.uuid4().hex
    if local is not None:
        return Output(Folder(local, run, is_guarded=False))  # anybody's, if it can be read
    return Output(Objects(os.fspath(path).rstrip("/"), run))
