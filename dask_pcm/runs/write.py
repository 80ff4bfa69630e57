"""``write_parquet``: checks what the user asks, then runs it here or in a thread."""

from __future__ import annotations

import logging
import os
import re
import threading
import uuid
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
from distributed import Client

from dask_pcm.arguments import checked, frame_refused
from dask_pcm.errors import InputError, OutputError, RunCancelledError, redacted
from dask_pcm.ledger.output import Output, local_path
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.paths import path_text
from dask_pcm.plugins.install import current_client
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.handle import Run
from dask_pcm.runs.lost import cluster_errors_told
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.failure_limit import FailureLimit
from dask_pcm.runs.session import Options, Session

logger = logging.getLogger(__name__)


@checked
def write_parquet(
    ddf: dd.DataFrame,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extend: bool = False,
    retry_failed: bool = False,
    max_failed_rows: int | None = None,
    max_failed_share: float | None = None,
    take_over: bool = False,
    wait: bool = True,
    progress: bool | None = None,
    lock_folder: str | os.PathLike[str] | None = None,
    client: Client | None = None,
) -> Run:
    """Compute a frame into a folder of Parquet files, each row exactly once.

    After an interruption or a crash, rerun the same call to resume: committed rows are never
    computed again. An output has one run at a time; a second one is refused with BusyError.

    Parameters
    ----------
    ddf
        Any Dask DataFrame. Over ``dask_pcm.read_parquet`` and functions by rows (``batch_rows``),
        a unit of work is any range of rows; otherwise it is a partition.
    path
        Output folder, on a filesystem that driver and workers share; or a folder of an object
        store by its fsspec URL.
    overwrite
        Start anew, and fence any run that is at work on the output. The old parts are deleted when
        the first new part is committed; if none ever is, they are put back.
    extend
        Include input files that were added since the output was begun.
    retry_failed
        Compute the rows that have an error again, and no others. Where a part's rows are not those
        of its input (functions of partitions, filters), the whole part is computed again.
    max_failed_rows, max_failed_share
        End the run, with some of the errors, when more rows than this have failed: a number, such
        as 20, or a share of the rows done, such as 0.01, checked from 1,000 rows on and at the end.
        By default any number may fail, with one exception: if no row of the output has succeeded,
        and every row of the run's first three batches (or of all its batches, if fewer) raises the
        same type of exception, the run ends with that exception and a row that raised it.
        ``max_failed_share=1`` turns this off, too. Rows that ``retry_failed`` computes again do not
        count.
    take_over
        Fence another run that is at work on the output, and resume from what it committed.
    wait
        Return when the run has ended; otherwise at once, while a thread drives the run.
    progress
        Whether to show the progress; by default if `wait`.
    lock_folder
        For object stores without conditional puts: a folder for lock files, on a filesystem that
        driver and workers share.
    client
        A client of the cluster; the current one if left out. The toolkit is installed on it.

    Returns
    -------
    Run
        To wait for the run, look at it, pause or cancel it; it has the report.

    Raises
    ------
    InstallError
        There is no Dask client, or ``install(client)`` was not called.
    SchemaError
        A column's type cannot be stored, `meta` says nothing of it, or what the function returned
        does not fit `meta`.
    InputError
        The input cannot be read, or has changed since this output was begun.
    BusyError
        Another run is at work on the output.
    OutputError
        The output is another job's, holds other files or cannot be written; nothing was changed.
    DeviceMemoryError
        The declared memory of the contexts is more than any worker's devices have, or any pool's.
    LoadError, FailedRowsError, LostProcessError
        A context cannot be loaded, too many rows failed, or row after row ended its worker; what
        was committed stays.
    FencedError
        Another run has taken the output over.
    Exception
        What the function raised on every one of the first rows.
    RunCancelledError
        The run was cancelled, from this process or another, while this call waited.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise frame_refused("write_parquet", ddf)
    for name, given in {"overwrite": overwrite, "take_over": take_over}.items():
        if not isinstance(given, (bool, np.bool_)):  # "no" would be taken for yes
            raise OutputError(f"{name} is {given!r:.40}; expected True or False.")
    client, plan = current_client(client), Plan(ddf)
    limit = FailureLimit(max_failed_rows, max_failed_share)
    options = Options(overwrite, extend, retry_failed, take_over, limit)
    if extend and plan.spans is None:
        raise InputError(
            "extend=True takes in new files of pcm.read_parquet, with nothing but functions of"
            " partitions and rows above it; it cannot tell which partitions of this frame are new."
        )
    mine = manifest.identify(ddf.expr, plan.is_splittable)
    output = output_at(path, lock_folder)
    _check_apart(output, plan)
    with cluster_errors_told(client, output.path):
        session = Session(client, plan, output, mine, options)
    run = Run(output, session.state)
    if wait:
        session.drive(is_shown=progress is not False)
        return run

    def drive() -> None:
        try:
            session.drive(is_shown=bool(progress))
        except BaseException as error:
            run._error = error
            if not isinstance(error, RunCancelledError):
                logger.error("The run of %s ended: %s", redacted(output.path), redacted(str(error)))

    run._thread = threading.Thread(target=drive, name=f"pcm-run-{output.run[:8]}", daemon=True)
    run._thread.start()
    return run


def output_at(
    path: str | os.PathLike[str], lock_folder: str | os.PathLike[str] | None = None
) -> Output:
    """The output at a path or a URL, for a new run.

    Raises
    ------
    OutputError
        The store at the URL cannot be used.
    """
    _check_path(path)
    local = local_path(path)
    if local is not None:
        return Output(Folder(local, uuid.uuid4().hex))
    locks = None if lock_folder is None else os.fspath(lock_folder)
    return Output(Objects.at(os.fspath(path), locks))


def _check_path(path: Any) -> None:
    """Refuse what would become a folder of a name that was not meant."""
    if not isinstance(path, (str, os.PathLike)):
        raise OutputError(f"The output is {path!r:.80}; expected a path or a URL.")
    text = path_text(path)
    if text != text.strip() or not text:
        raise OutputError(
            f"The output path {text!r} is empty, or begins or ends with a space. Give a folder:"
            " './' for the current one."
        )
    if found := re.match(r"([a-z][a-z0-9+.-]+):/(?!/)", text):
        raise OutputError(
            f"{text!r} would be a local folder {found[1] + ':'!r}. For a URL, give"
            f" {text.replace(':/', '://', 1)!r}."
        )


def _check_apart(output: Output, plan: Plan) -> None:
    """Refuse an output inside the input, or an input inside the output."""
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
        f"The output {output!r} and the input {given!r} overlap. Give a folder outside the input."
    )
