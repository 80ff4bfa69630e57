"""``dask-pcm run`` and ``dask-pcm demo`` start runs from the command line.

Imports that take seconds are inside the commands: ``--help`` answers immediately, and ``demo``
prints what it starts before it imports anything.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dask_pcm.cli.errors import reported_errors, say, summarize
from dask_pcm.cli.inference import inference_options, inferred, kind_of
from dask_pcm.errors import FailedRowsError, PCMError

if TYPE_CHECKING:
    from dask_pcm.inference import LLM
    from dask_pcm.runs.progress.report import Report
    from dask_pcm.runs.sampling import Sample


@dataclass(frozen=True, slots=True)
class _DemoModel:
    """What the demo says of a model, and how many rows it verifies by default."""

    rows: int
    about: str
    accuracy_note: str = ""


_DEMO_MODELS = {
    "demo": _DemoModel(5_000, "the model that the package includes. This takes a few seconds."),
    "smollm2": _DemoModel(
        500,
        "SmolLM2-135M. This takes a minute or two on a CPU; before the first run, its weights are"
        " converted.",
        " (at chance; the demo's own model is trained for it)",
    ),
}


@click.command()
@click.argument("input", metavar="INPUT")
@click.argument("output", metavar="OUTPUT")
@click.option("--model", required=True, help="Folder, Hugging Face hub id, 'demo' or 'smollm2'.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@inference_options
@click.option("--workers", type=click.IntRange(1), help="Number of workers of a local cluster.")
@click.option(
    "--scheduler", metavar="ADDRESS", help="Scheduler of a running cluster, or its connection file."
)
@click.option("--cluster", metavar="FILE", help="Pools of workers to start for this run (YAML).")
@click.option("--overwrite", is_flag=True, help="Delete what another run left in OUTPUT.")
@click.option("--extend", is_flag=True, help="Include input files added since OUTPUT was started.")
@click.option("--retry-failed", is_flag=True, help="Compute rows with an error again.")
@click.option("--take-over", is_flag=True, help="Fence off a run that is writing to OUTPUT.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Answer N rows; write nothing.")
@click.option(
    "--lock-folder",
    metavar="DIR",
    help="Shared folder for locks; for stores without conditional put.",
)
@click.option(
    "--max-failed-rows", type=click.IntRange(0), metavar="N", help="Stop if more than N rows fail."
)
@click.option(
    "--max-failed-share",
    metavar="P",
    help="Stop if a larger share of the rows fails, such as 0.05 or 5%.",
)
@click.option("--report", metavar="FILE", help="Write the report to FILE, as JSON.")
def run(
    input: str,
    output: str,
    model: str,
    revision: str | None,
    workers: int | None,
    scheduler: str | None,
    cluster: str | None,
    overwrite: bool,
    extend: bool,
    retry_failed: bool,
    take_over: bool,
    sample: int | None,
    lock_folder: str | None,
    max_failed_rows: int | None,
    max_failed_share: str | None,
    report: str | None,
    **asked: Any,
) -> None:
    """Answer, continue or embed every row of INPUT, a Parquet file or folder, with a model."""
    from dask_pcm.cli.cluster import client_of
    from dask_pcm.parquet.pieces import read_parquet
    from dask_pcm.runs.sampling import sample as draw_sample
    from dask_pcm.runs.write import write_parquet

    if sum(map(bool, (workers, scheduler, cluster))) > 1:
        raise click.UsageError("Give one of --workers, --scheduler and --cluster.")
    if sample and report:
        raise click.UsageError("A sample has no report: give --sample or --report, not both.")
    kind_of(asked)
    share = _share(max_failed_share)
    # Checked before hours of inference.
    if report and not os.access(Path(report).absolute().parent, os.W_OK):
        raise click.BadParameter(f"The report cannot be written to {report!r}.")
    with reported_errors(output):
        verdicts = inferred(read_parquet(input), lambda: _model(model, revision), asked)
        with client_of(workers, scheduler, cluster) as client:
            if sample:
                begun = None if overwrite else output
                _show_sample(draw_sample(verdicts, sample, output=begun, client=client))
                return
            with _report_of_failed(report, output):
                done = write_parquet(
                    verdicts,
                    output,
                    overwrite=overwrite,
                    extend=extend,
                    retry_failed=retry_failed,
                    take_over=take_over,
                    lock_folder=lock_folder,
                    max_failed_rows=max_failed_rows,
                    max_failed_share=share,
                    client=client,
                )
    if report:
        _write_report(report, done.report)
    summarize(done)


@click.command()
@click.option(
    "--model",
    default="demo",
    show_default=True,
    type=click.Choice(list(_DEMO_MODELS)),
    help="The package's own, or SmolLM2-135M, whose weights are a package of their own.",
)
@click.option(
    "--rows",
    show_default=", ".join(f"{of.rows:,} for {name}" for name, of in _DEMO_MODELS.items()),
    type=click.IntRange(0),
)
@click.option("--output", metavar="DIR", help="Folder for the verdicts.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--overwrite", is_flag=True, help="Delete what another run left in DIR.")
def demo(model: str, rows: int | None, output: str | None, workers: int, overwrite: bool) -> None:
    """Verify generated claims with the model that the package includes, or with SmolLM2."""
    chosen = _DEMO_MODELS[model]
    rows = chosen.rows if rows is None else rows
    many = f"{workers} workers" if workers > 1 else "1 worker"
    click.echo(
        f"Starting {many} on this machine to verify {rows:,} generated claims with {chosen.about}",
        err=True,
    )
    from dask_pcm.cli.cluster import client_of
    from dask_pcm.factcheck import demo as factcheck
    from dask_pcm.factcheck.smollm2 import smollm2
    from dask_pcm.parquet.pieces import read_parquet
    from dask_pcm.runs.write import write_parquet

    with tempfile.TemporaryDirectory(prefix="dask-pcm-demo-") as scratch:
        target = Path(output) if output else Path(scratch, "verdicts")
        claims = Path(scratch, "claims")
        with reported_errors(output):
            llm = smollm2() if model == "smollm2" else factcheck.demo_model()
            factcheck.write_claims(claims, rows)
            with client_of(workers, None) as client:
                verdicts = factcheck.verify(read_parquet(str(claims)), llm)
                done = write_parquet(verdicts, target, overwrite=overwrite, client=client)
        summarize(done, is_kept=output is not None)
        if rows:
            say(f"accuracy        {factcheck.accuracy(target):.1%}{chosen.accuracy_note}")


def _share(value: str | None) -> float | None:
    """A share of rows, from a number or a percentage."""
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        if 0 <= share <= 1:
            return share
    except ValueError:
        pass
    raise click.BadParameter(
        f"{value!r} is no share of the rows: give a number from 0 to 1, or 0% to 100%.",
        param_hint="--max-failed-share",
    )


def _model(model: str, revision: str | None) -> LLM:
    """The model of ``--model``: the package's own for "demo", or that of another package."""
    from dask_pcm.factcheck import demo_model
    from dask_pcm.factcheck.smollm2 import smollm2
    from dask_pcm.inference import LLM

    known = {"demo": demo_model, "smollm2": smollm2}
    return known[model]() if model in known else LLM(model, revision=revision)


@contextmanager
def _report_of_failed(report: str | None, output: str) -> Iterator[None]:
    """Write the report of a run that fails, then let the error through."""
    from dask_pcm.runs.handle import attach

    try:
        yield
    except Exception as error:
        # Other PCMErrors are raised before the run starts: the report would be an earlier run's.
        if report and (isinstance(error, FailedRowsError) or not isinstance(error, PCMError)):
            _write_report(report, attach(output).report)
        raise


def _show_sample(sample: Sample) -> None:
    """Print a sample's rows, its summary and its errors."""
    import pandas as pd

    with pd.option_context("display.max_rows", 40, "display.width", 100):
        say(sample.frame.to_string(index=False, max_rows=40, max_colwidth=40))
    say(str(sample))
    for error in sample.errors:
        say(f"a failed row    {error}".replace("\n", "\\n"))


def _write_report(path: str, report: Report) -> None:
    """Write a report as JSON."""
    Path(path).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
