"""``write_parquet``: one run of a job, from its manifest to its report."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import dask.dataframe as dd
from distributed import Client

from dask_pcm.arguments import checked, frame_refused
from dask_pcm.config import Config
from dask_pcm.errors import BusyError, CancelledError, InputError, OutputError, redacted
from dask_pcm.ledger import status
from dask_pcm.ledger.layout import MANIFEST, REPORT
from dask_pcm.ledger.output import Output, local_path
from dask_pcm.ledger.stash import drop_stash, stash, unstash
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.ledger.takeover import fence_others, other_runs
from dask_pcm.plugins.install import current_client, install, is_installed
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.driver import Driver
from dask_pcm.runs.handle import Run, output_to_look_at
from dask_pcm.runs.identity import Manifest
from dask_pcm.runs.lost import cluster_errors_told
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.failure_limit import FailureLimit
from dask_pcm.runs.progress.sample import Sample, draw
from dask_pcm.runs.units.schema import PartSchema
from dask_pcm.runs.units.unit import UnitSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do, besides its job."""

    overwrite: bool
    extend: bool
    retry_failed: bool
    take_over: bool
    limit: FailureLimit


@overload
def write_parquet(
    ddf: dd.DataFrame,
    path: str | os.PathLike[str],
    *,
    sample: int,
    overwrite: bool = False,
    extend: bool = False,
    client: Client | None = None,
) -> Sample: ...


@overload
def write_parquet(
    ddf: dd.DataFrame,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extend: bool = False,
    retry_failed: bool = False,
    max_failed_rows: float | str | FailureLimit | None = None,
    take_over: bool = False,
    sample: None = None,
    wait: bool = True,
    progress: bool | None = None,
    lock_folder: str | os.PathLike[str] | None = None,
    client: Client | None = None,
) -> Run: ...


@checked
def write_parquet(
    ddf: dd.DataFrame,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extend: bool = False,
    retry_failed: bool = False,
    max_failed_rows: float | str | FailureLimit | None = None,
    take_over: bool = False,
    sample: int | None = None,
    wait: bool = True,
    progress: bool | None = None,
    lock_folder: str | os.PathLike[str] | None = None,
    client: Client | None = None,
) -> Run | Sample:
    """Compute a frame into a folder of Parquet files, each row exactly once, whatever dies.

    Interrupted or killed, the same call goes on where it was: what was committed is never computed
    again. One run at a time is at work on an output; another is told whose it is.

    Parameters
    ----------
    ddf
        Any Dask DataFrame. Over ``dask_pcm.read_parquet`` and functions by rows (``batch_rows``),
        a unit of work is any range of rows; otherwise it is a partition.
    path
        Output folder, on a filesystem that driver and workers share; or a folder of an object
        store by its fsspec URL.
    overwrite
        Begin anew: drop what another run left, and shut out whatever of it still runs. What it
        left is dropped when the first new part is there; if none comes, it stays.
    extend
        Take in input files that were added since the output was begun.
    retry_failed
        Compute rows with an error again, and those only. Where the rows of a part are not those of
        its input (functions of partitions, filters), the part is computed again as a whole.
    max_failed_rows
        End the run, with some of the errors, as soon as more rows have failed: a number (20), or a
        share of the rows that are done (0.01, "1%"), looked at from 1,000 rows on and at the end.
        Without it, any number may, unless nothing else comes: where no row of the output has
        succeeded, and every row of the first three batches of a run raises one type of exception
        (or every row, if there are fewer batches), the run ends with that exception and a row that
        made it. Rows that ``retry_failed`` computes again do not count. "100%" goes on all the
        same.
    take_over
        Shut out another run that is at work on the output, and go on where it was.
    sample
        Answer so many rows drawn at random from the whole, always the same ones, and estimate what
        the rest would take. Nothing is written anywhere; of the other options only `overwrite` and
        `extend` are of account.
    wait
        Return when all is done; otherwise at once, while a thread drives the run.
    progress
        Whether to show how it goes; by default if `wait`.
    lock_folder
        For object stores that cannot put an object only if there is none: a folder for lock files
        on a filesystem that driver and workers share.
    client
        A client of the cluster; the one made last if left out. The toolkit is installed on it.

    Returns
    -------
    Run
        With which it can be waited for, looked at, paused and cancelled; and with its report.
    Sample
        Where a `sample` was asked for: its rows, rows/s and the device-hours of the rest.

    Raises
    ------
    BusyError
        Where another run is at work on the output.
    OutputError
        Where the output is another job's, holds other files or cannot be written; nothing there
        was changed then.
    LoadError, FailedRowsError
        Where a context cannot be loaded, or too many rows fail; what was committed stays.
    Exception
        What a function raised, where it raised that on all of the first rows.
    CancelledError
        Where somebody cancelled the run while we waited.
    """
    client, plan = _prepare(ddf, client)
    options = Options(overwrite, extend, retry_failed, take_over, FailureLimit.of(max_failed_rows))
    if extend and plan.spans is None:
        raise InputError(
            "extend=True takes in new files of pcm.read_parquet, with nothing but functions of"
            " partitions and rows above it; it cannot tell which partitions of this frame are new."
        )
    mine = manifest.identify(ddf.expr, plan.is_splittable)
    if sample is not None:
        return _draw(client, plan, output_to_look_at(path), mine, options, sample)
    output = output_at(path, lock_folder)
    _check_apart(output, plan)
    session = _Session(client, plan, output, options)
    with cluster_errors_told(client, output.path):
        session.begin(mine)
    run = Run(output, session.driver)
    if wait:
        session.drive(is_shown=progress is not False)
        return run

    def drive() -> None:
        try:
            session.drive(is_shown=bool(progress))
        except BaseException as error:
            run._error = error
            if not isinstance(error, CancelledError):
                logger.error("The run of %s ended: %s", redacted(output.path), redacted(str(error)))

    run._thread = threading.Thread(target=drive, name=f"pcm-run-{output.run[:8]}", daemon=True)
    run._thread.start()
    return run


def _prepare(ddf: dd.DataFrame, client: Client | None) -> tuple[Client, Plan]:
    if not isinstance(ddf, dd.DataFrame):
        raise frame_refused("write_parquet", ddf)
    return current_client(client), Plan(ddf)


def _draw(
    client: Client, plan: Plan, output: Output, mine: Manifest, options: Options, n_rows: int
) -> Sample:
    found = manifest.check(output, mine, options.overwrite, options.extend)
    n_done = Run(output).progress.done if found is not None else 0
    with cluster_errors_told(client, output.path):
        if not is_installed(client):
            install(client)
        return draw(client, plan, n_rows, n_done)


def output_at(
    path: str | os.PathLike[str], lock_folder: str | os.PathLike[str] | None = None
) -> Output:
    """An output at a path or a URL, as a new run sees it.

    Raises
    ------
    OutputError
        Where the store at a URL cannot be used.
    """
    local = local_path(path)
    if local is not None:
        return Output(Folder(local, uuid.uuid4().hex))
    locks = None if lock_folder is None else os.fspath(lock_folder)
    return Output(Objects.at(os.fspath(path), locks))


class _Session:
    """A run's time at its output, from taking over to leaving."""

    driver: Driver

    def __init__(self, client: Client, plan: Plan, output: Output, options: Options) -> None:
        self._client = client
        self._plan = plan
        self._output = output
        self._options = options
        self._start = time.monotonic()
        self._stack = contextlib.ExitStack()

    def begin(self, mine: Manifest) -> None:
        """Take over the output, unless it is another job's or another run is at work on it."""
        self._refuse_if_busy()
        if not other_runs(self._output):  # else: what a dead run left is put in order first
            self._check(mine)
        if not is_installed(self._client):
            install(self._client)
        layout = PartSchema.of(self._plan.meta, self._plan.reader)
        config, options = Config.read(), self._options
        timeout_s = self._plan.timeout_s or config.batch_timeout_s
        sizes = (config.unit_bytes, self._plan.batch_rows) if self._plan.is_splittable else (0, 0)
        job = UnitSpec(self._output, layout, {}, *sizes, timeout_s=timeout_s)
        self.driver = Driver(
            self._client, self._plan, job, config, options.limit, options.retry_failed
        )
        with contextlib.ExitStack() as stack:
            stack.callback(self.driver.close)
            if not self._output.storage.exists(MANIFEST):
                self.driver.warm()
            with self._output.storage.fence.takeover_lock():
                fence_others(
                    self._output, include_alive=False
                )  # what a dead run had set aside is back
                self._refuse_if_busy()  # again: another run may have begun in the meantime
                found = self._check(mine)
                fence_others(self._output)
                found = self._still(found)
                stack.enter_context(self._output.storage.fence.open_run(status.whoami()))
                if found is None:
                    stack.push(self._put_back)
                    stash(self._output)
                used = self._write_manifest(found, mine)
                self._output = replace(self._output, generation=used.recorded["begun"])
                self.driver.begin(self._output, self._provenance(mine))
                stack.enter_context(self.driver.alive())
            self._stack = stack.pop_all()

    def _refuse_if_busy(self) -> None:
        options, output = self._options, self._output
        busy = [owner for owner in other_runs(output) if owner.is_alive]
        if busy and not (options.overwrite or options.take_over):
            raise BusyError(
                f"Another run is at work on {output.path!r}: {busy[0]}. Wait for it with"
                f" pcm.attach({output.path!r}).wait(), look with dask-pcm status, or shut it out"
                " with take_over=True (--take-over)."
            )

    def _check(self, mine: Manifest) -> Manifest | None:
        options = self._options
        return manifest.check(self._output, mine, options.overwrite, options.extend)

    def _still(self, found: Manifest | None) -> Manifest | None:
        """The manifest to go on with, now that every other run is shut out.

        Where one was about to overwrite the output, and had come to nothing, what it had set aside
        is back: then this run begins anew, as that one had.
        """
        if found is None or (now := Manifest.read(self._output)) is None:
            return None
        return found if now.recorded.get("begun") == found.recorded.get("begun") else None

    def _write_manifest(self, found: Manifest | None, mine: Manifest) -> Manifest:
        """Write it if the job is new, or has new input; count rows in the order that it says."""
        plan = self._plan
        used = mine if found is None else found
        plan.arrange(list(used.identity.get("input", {})))
        counted = "parts" if plan.spans is None else "rows"
        recorded = {
            **used.recorded,
            "total": plan.n_rows,
            "counted": counted,
            "committed_by": self._output.commit_method,
            "begun": uuid.uuid4().hex if found is None else used.recorded.get("begun", ""),
        }
        written = Manifest(used.identity, recorded)
        if found is None or recorded != used.recorded or self._options.extend:
            written.write(self._output)
        return written

    def _provenance(self, mine: Manifest) -> dict[str, object]:
        about = {k: v for k, v in mine.identity.items() if k not in manifest.UNTOLD}
        own = {"format": manifest.FORMAT, "job": mine.token, "begun": self._output.generation}
        return {**own, **mine.recorded, **about}

    def drive(self, is_shown: bool) -> None:
        """Do the work, and leave."""
        report = self.driver.report
        with self._stack:
            try:
                with cluster_errors_told(self._client, self._output.path):
                    self.driver.drive(is_shown)
                drop_stash(self._output)
            except BaseException as error:
                is_meant = isinstance(error, (CancelledError, KeyboardInterrupt))
                report.state = status.CANCELLED if is_meant else status.FAILED
                report.error = redacted(f"{type(error).__name__}: {error}")
                with contextlib.suppress(Exception):  # the first error is the one to be told
                    self._conclude()
                raise
            report.state = status.FINISHED
            self._conclude()

    def _conclude(self) -> None:
        report = self.driver.report
        report.total_s = time.monotonic() - self._start
        n_rows = report.rows - report.rows_resumed + report.rows_retried
        report.rows_per_s = n_rows / report.total_s
        self._output.write_json(REPORT, report.as_dict())
        found = Manifest.read(self._output)
        if found is not None and report.ran_on:
            ran_on = sorted({*found.recorded.get("ran_on", []), *report.ran_on})
            Manifest(found.identity, {**found.recorded, "ran_on": ran_on}).write(self._output)

    def _put_back(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not self.driver.has_committed:
            unstash(self._output)


def _check_apart(output: Output, plan: Plan) -> None:
    """Refuse an output that would be read as input, or the other way round."""
    if "://" in output.path:
        mine = output.path
        inside = [p for p in plan.input_paths if f"{p}/".startswith(f"{mine}/")]
        inside += [p for p in plan.input_paths if f"{mine}/".startswith(f"{p}/")]
        if inside:
            raise _inside(mine, inside[0])
        return
    place = Path(os.path.realpath(output.path))
    for path in plan.input_paths:
        if "://" in path and not path.startswith("file://"):
            continue
        given = Path(os.path.realpath(path.removeprefix("file://")))
        if given == place or place in given.parents or (given.is_dir() and given in place.parents):
            raise _inside(output.path, path)


def _inside(output: str, given: str) -> OutputError:
    return OutputError(
        f"The output {output!r} and the input {given!r} lie in each other. Give a folder beside the"
        " input."
    )
