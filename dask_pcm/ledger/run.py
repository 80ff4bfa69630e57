"""``write_parquet``: one run of a job, from its manifest to its report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

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
        Begin anew: drop what another run left, and shut out whatever of it still runs. What it
        left is dropped when the first new part is there; if none comes, it stays.
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
        if not is_resumed:
            driver.warm()
        with output.taking_over():
            # Again: another run may have begun in the meantime.
            is_resumed = manifest.check(output, mine, overwrite)
            output.fence()
            if not is_resumed:
                output.set_aside()
                manifest.write(output, mine, {ref.name: ref.digest for ref in plan.refs})
        report = driver.drive(progress)
        output.drop_aside()
        report.total_s = time.monotonic() - start
        report.rows_per_s = (report.rows - report.rows_resumed) / report.total_s
        output.write_json("report.json", report.as_dict())
    except BaseException:
        if not driver.has_committed:
            output.put_back()
        raise
    finally:
        driver.close()
        output.close()
    return Run(output.path, report)


def _check_apart(output: Output, plan: Plan) -> None:
    """Refuse an output that would be read as input, or the other way round."""
    mine = Path(os.path.realpath(output.path))
    for path in plan.input_paths:
        if "://" in path and not path.startswith("file://"):
            continue
        given = Path(os.path.realpath(path.removeprefix("file://")))
        if given == mine or mine in given.parents or (given.is_dir() and given in mine.parents):
            raise OutputError(
                f"The output folder {output.path!r} and the input {path!r} lie in each other. Give"
                " a folder beside the input."
            )
