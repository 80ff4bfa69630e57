"""``write_parquet``: one run of a job, from its manifest to its report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd
from distributed import Client

from dask_pcm.config import Config
from dask_pcm.errors import OutputError, SchemaError
from dask_pcm.ledger import manifest
from dask_pcm.ledger.commit import Output
from dask_pcm.ledger.driver import Driver
from dask_pcm.ledger.plan import Plan
from dask_pcm.ledger.report import Report
from dask_pcm.plugins.install import current_client, install, is_installed


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes
    ----------
    path
        The output folder.
    report
        What came out; see ``Report``.
    """

    path: str
    report: Report

    def __repr__(self) -> str:
        r = self.report
        return (
            f"<Run {self.path!r}: {r.rows:,} rows, {r.rows_failed:,} failed,"
            f" {r.rows_resumed:,} resumed, {r.rows_per_s:,.0f} rows/s, {r.context_loads} loads>"
        )


def write_parquet(
    ddf: dd.DataFrame,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    progress: bool = True,
    client: Client | None = None,
) -> Run:
    """Compute a frame into a folder of Parquet files, each row exactly once, whatever dies.

    Blocks until all is done. Interrupted or killed, the same call goes on where it was: what was
    committed is never computed again.

    Parameters
    ----------
    ddf
        Any Dask DataFrame. Over ``dask_pcm.read_parquet`` and functions by rows (``batch_rows``),
        a unit of work is any range of rows; otherwise it is a partition.
    path
        Output folder, on a filesystem that driver and workers share.
    overwrite
        Begin anew: drop what another run left, and shut out whatever of it still runs.
    progress
        Whether to show how it goes.
    client
        A client of the cluster; the one made last if left out. The toolkit is installed on it.

    Returns
    -------
    Run
        With its report.

    Raises
    ------
    OutputError
        Where the output is another job's, holds other files or cannot be written; nothing there
        was changed then.
    LoadError
        Where a context cannot be loaded; what was committed stays.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise SchemaError(f"write_parquet writes a Dask DataFrame; found {type(ddf).__name__}.")
    client = client or current_client()
    start = time.monotonic()
    plan = Plan(ddf)
    output = Output.at(path)
    _check_apart(output, plan)
    mine = manifest.identity(ddf.expr, plan.is_splittable)
    is_resumed = manifest.check(output, mine, overwrite)
    output.open()
    driver = Driver(client, plan, output, Config.read())
    try:
        if not is_installed(client):
            install(client)
        driver.warm()
        output.fence()
        if not is_resumed:
            _begin_anew(output, plan, mine)
        report = driver.drive(progress)
        report.total_s = time.monotonic() - start
        report.rows_per_s = (report.rows - report.rows_resumed) / report.total_s
        output.write_json("report.json", report.as_dict())
    finally:
        driver.close()
        output.close()
    return Run(output.path, report)


def _begin_anew(output: Output, plan: Plan, mine: dict[str, Any]) -> None:
    """Drop parts of another job, then say whose this is, in that order."""
    for path in (output.home / manifest.MANIFEST, *(output.home / "started").iterdir()):
        path.unlink(missing_ok=True)
    for name in output.parts():
        os.unlink(os.path.join(output.path, name))
    manifest.write(output, mine, {ref.name: ref.digest for ref in plan.refs})


def _check_apart(output: Output, plan: Plan) -> None:
    for path in plan.reader.files if plan.reader else ():
        if path.startswith("file://") and os.path.realpath(path[7:]).startswith(
            os.path.realpath(output.path) + os.sep
        ):
            raise OutputError(f"The output folder {output.path!r} holds the input {path!r}.")
