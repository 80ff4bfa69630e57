"""``Run``: a handle on a run, in the process that drives it or in any other."""

from __future__ import annotations

import os
import threading
import time
import uuid

from dask_pcm.errors import OutputError, PCMError, RunCancelledError, redacted
from dask_pcm.ledger.layout import CANCEL, PAUSE, REPORT
from dask_pcm.ledger.output import Output, local_path
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.ledger.takeover import other_runs, read_driver
from dask_pcm.ledger.writer import Writer
from dask_pcm.runs.identity import Manifest
from dask_pcm.runs.progress.progress import (
    CANCELLED,
    FINISHED,
    INTERRUPTED,
    PAUSED,
    RUNNING,
    STARTING,
    Progress,
)
from dask_pcm.runs.progress.report import Report
from dask_pcm.runs.progress.state import RunState
from dask_pcm.runs.progress.stored import stored_progress

_POLL_S = 0.5


class Run:
    """A run of a job: ``write_parquet`` returns it, ``attach`` finds it.

    Every method may be called from any thread, in the process that drives the run or in any other
    that sees the output.
    """

    def __init__(self, output: Output, state: RunState | None = None) -> None:
        self._output = output
        self._state = state
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
        """How far the run is; see ``Progress``."""
        if self._state is not None:
            self._seen = self._state.progress
        else:
            self._seen = stored_progress(self._output, self._writer())
        return self._seen

    @property
    def report(self) -> Report:
        """The figures so far; see ``Report``."""
        if self._state is not None:
            return self._state.report
        # While a run drives the output, the file is that of the run before it.
        found = None if self.driver else self._output.read_told(REPORT)
        if found:
            return Report.of(found)
        progress = self.progress
        is_counted = progress.counted == "rows"
        rows = progress.done if is_counted else 0
        return Report(state=progress.state, rows=rows, rows_failed=progress.failed)

    @property
    def driver(self) -> str:
        """Run, process, user and host that drive it; "" if the driver has ended or died."""
        writer = self._writer()
        return str(writer) if writer is not None and writer.is_alive else ""

    @property
    def at_work(self) -> tuple[str, str]:
        """The run's identity, and its scheduler's address or connection file.

        Raises
        ------
        OutputError
            No run is at work, or it does not say where.
        """
        self._driven()
        writer = self._writer()
        found = writer.says.get("scheduler") if writer is not None else None
        if writer is None or not isinstance(found, str):
            raise OutputError(f"The run of {self.path!r} does not say where its scheduler is.")
        return writer.run, found

    def pause(self) -> None:
        """Start no more units until ``resume``; workers finish those that they have."""
        self._request(PAUSE)

    def resume(self) -> None:
        """Start units again after ``pause``."""
        output = self._driven()
        output.storage.remove(f"{output.run_dir}/{PAUSE}")

    def cancel(self) -> None:
        """End the run. What is committed stays; the same job resumes from there."""
        self._request(CANCEL)

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until the run has ended, and return its report.

        Parameters
        ----------
        timeout
            Seconds to wait at most; no limit if left out.

        Raises
        ------
        TimeoutError
            The run has not ended by then; it goes on.
        PCMError
            The run failed, was cancelled, or its driver died. In the process that drives it, the
            exception that ended it, of any type.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        # A blocking run has neither thread nor another driver: it has ended.
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"The run of {self.path!r} goes on: {self.progress}")
        elif self._state is None:
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
                f"The driver of the run of {self.path!r} has died ({progress}). Rerun the"
                " same call to resume."
            )
        kind = RunCancelledError if progress.state == CANCELLED else PCMError
        raise kind(self.report.error or f"The run of {self.path!r} {progress.state}.")

    def _writer(self) -> Writer | None:
        """The run that drives the output, or drove it and died."""
        writers = other_runs(self._output)
        driver_json = f"{self._output.run_dir}/driver.json"
        if self._state is not None and self._output.storage.exists(driver_json):
            says = read_driver(self._output, self._output.run) or {}
            writers.append(Writer(self._output.run, says, True))
        return max(writers, key=lambda writer: writer.is_alive, default=None)

    def _driven(self) -> Output:
        """The output as the run that drives it sees it."""
        writer = self._writer()
        if writer is None or not writer.is_alive:
            raise OutputError(
                f"No run is at work on {self.path!r} ({self.progress}). To resume it, run the same"
                " job again."
            )
        return self._output.as_run(writer.run)

    def _request(self, what: str) -> None:
        output = self._driven()
        output.storage.write(f"{output.run_dir}/{what}", b"")

    def __repr__(self) -> str:
        """How the run stands; if another process drives it, as it was last read.

        Does no I/O: notebooks and debuggers call it at any moment, and a store may not answer.
        """
        if self._state is not None and self._state.progress.state == FINISHED:
            return f"<Run {redacted(self.path)!r}: {self._state.report.summary}>"
        progress = self._seen if self._state is None else self._state.progress
        return f"<Run {redacted(self.path)!r}{'' if progress is None else f': {progress}'}>"


def attach(path: str | os.PathLike[str]) -> Run:
    """A handle on the run of an output, in any process; the run may be at work or have ended.

    Parameters
    ----------
    path
        The output folder, or its URL.

    Returns
    -------
    Run
        To look at it, wait for it, pause or cancel it.

    Raises
    ------
    OutputError
        There is no output of this package.
    """
    output = output_to_look_at(path)
    if Manifest.read(output) is None and not other_runs(output):
        raise OutputError(
            f"There is no output of dask_pcm at {output.path!r}: it has no manifest. Give the"
            " folder that was given to write_parquet or dask-pcm run."
        )
    run = Run(output)
    run.progress  # noqa: B018 # reads what the repr shows
    return run


def output_to_look_at(path: str | os.PathLike[str]) -> Output:
    """An output to read from, without a run of its own."""
    local = local_path(path)
    run = uuid.uuid4().hex
    if local is not None:
        return Output(Folder(local, run, is_guarded=False))  # of any user, if readable
    return Output(Objects(os.fspath(path).rstrip("/"), run))
