"""``dask-pcm run`` and ``dask-pcm demo``: runs from the command line.

What takes seconds to import is imported by the command that needs it: help is there at once, and
``demo`` first says what it starts.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dask_pcm.cli.errors import reported_errors, say, summarize
from dask_pcm.errors import FailedRowsError, LimitError, PCMError

if TYPE_CHECKING:
    from dask_pcm.inference import LLM
    from dask_pcm.runs import Report, Sample


@click.command()
@click.argument("input", metavar="INPUT")
@click.argument("output", metavar="OUTPUT")
@click.option("--model", required=True, help="Folder, Hugging Face hub id, or 'demo'.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--prompt", required=True, help="Text with columns in braces, or @FILE.")
@click.option(
    "--choices", required=True, multiple=True, help="A,B,C (repeatable), or @FILE, one a line."
)
@click.option("--truncate", metavar="FIELD", help="Field to cut where a row is too long.")
@click.option(
    "--special-tokens-in-fields",
    is_flag=True,
    help="Control tokens that a row spells out count as such; else they are text.",
)
@click.option(
    "--batch-timeout",
    metavar="TIME",
    help="End calls that take longer, such as 10m, and fail the rows that make them hang.",
)
@click.option("--keep", multiple=True, metavar="COLUMNS", help="Columns to keep, A,B (repeatable).")
@click.option("--workers", type=click.IntRange(1), help="Workers of a local cluster.")
@click.option("--scheduler", metavar="ADDRESS", help="A cluster that runs already.")
@click.option("--overwrite", is_flag=True, help="Drop what another run left in OUTPUT.")
@click.option("--extend", is_flag=True, help="Take in input files added since OUTPUT was begun.")
@click.option("--retry-failed", is_flag=True, help="Compute rows with an error again.")
@click.option("--take-over", is_flag=True, help="Shut out a run that is at work on OUTPUT.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Answer N rows; write nothing.")
@click.option(
    "--lock-folder", metavar="DIR", help="Shared folder, for stores without conditional put."
)
@click.option(
    "--max-failed-rows",
    default="1%",
    show_default=True,
    metavar="NUMBER|SHARE",
    help="End when more have failed: a number, or a share such as 0.05 or 5%.",
)
@click.option("--report", metavar="FILE", help="Where to write the report, as JSON.")
def run(
    input: str,
    output: str,
    model: str,
    revision: str | None,
    prompt: str,
    choices: tuple[str, ...],
    truncate: str | None,
    special_tokens_in_fields: bool,
    batch_timeout: str | None,
    keep: tuple[str, ...],
    workers: int | None,
    scheduler: str | None,
    overwrite: bool,
    extend: bool,
    retry_failed: bool,
    take_over: bool,
    sample: int | None,
    lock_folder: str | None,
    max_failed_rows: str,
    report: str | None,
) -> None:
    """Have a model choose an answer for every row of INPUT, a Parquet file or folder."""
    from dask_pcm.cli.cluster import client_of
    from dask_pcm.inference import classify
    from dask_pcm.parquet.pieces import read_parquet
    from dask_pcm.runs import write_parquet
    from dask_pcm.runs.progress.failure_limit import FailureLimit

    if workers and scheduler:
        raise click.UsageError("Give --workers or --scheduler, not both.")
    if sample and report:
        raise click.UsageError("A sample writes no report: give --sample or --report, not both.")
    try:
        limit = FailureLimit.of(max_failed_rows)
    except LimitError as error:
        raise click.BadParameter(str(error), param_hint="--max-failed-rows") from error
    if report and not os.access(Path(report).absolute().parent, os.W_OK):
        raise click.BadParameter(f"The report cannot be written to {report!r}.")
    with reported_errors(output):
        verdicts = classify(
            read_parquet(input),
            _model(model, revision),
            prompt=_text(prompt),
            choices=_list(choices),
            truncate=truncate,
            special_tokens_in_fields=special_tokens_in_fields,
            batch_timeout=batch_timeout,
            keep=_list(keep) or None,
        )
        with client_of(workers, scheduler) as client:
            options = {"overwrite": overwrite, "extend": extend, "client": client}
            if sample:
                _show_sample(write_parquet(verdicts, output, sample=sample, **options))
                return
            with _report_of_failed(report, output):
                done = write_parquet(
                    verdicts,
                    output,
                    retry_failed=retry_failed,
                    take_over=take_over,
                    lock_folder=lock_folder,
                    max_failed_rows=limit,
                    **options,
                )
    if report:
        _write_report(report, done.report)
    summarize(done)


@click.command()
@click.option("--rows", default=5_000, show_default=True, type=click.IntRange(0))
@click.option("--output", metavar="DIR", help="Where to leave the verdicts.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--overwrite", is_flag=True, help="Drop what another run left in DIR.")
def demo(rows: int, output: str | None, workers: int, overwrite: bool) -> None:
    """Verify generated claims with the model shipped in the package."""
    many = f"{workers} workers" if workers > 1 else "1 worker"
    click.echo(
        f"Starting {many} on this machine, to verify {rows:,} generated claims with the model that"
        " the package ships. The start takes some seconds.",
        err=True,
    )
    from dask_pcm.cli.cluster import client_of
    from dask_pcm.factcheck import demo as factcheck
    from dask_pcm.parquet.pieces import read_parquet
    from dask_pcm.runs import write_parquet

    with tempfile.TemporaryDirectory(prefix="dask-pcm-demo-") as scratch:
        target = Path(output) if output else Path(scratch, "verdicts")
        claims = Path(scratch, "claims")
        with reported_errors(str(target)):
            factcheck.write_claims(claims, rows)
            with client_of(workers, None) as client:
                verdicts = factcheck.verify(read_parquet(str(claims)))
                done = write_parquet(verdicts, target, overwrite=overwrite, client=client)
        summarize(done, is_kept=output is not None)
        if rows:
            say(f"accuracy        {factcheck.accuracy(target):.1%}")


def _text(value: str) -> str:
    """A text, or the content of a file given as @FILE, its last line end left out."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"Cannot read {value[1:]!r} as text: {error}.") from error


def _list(values: tuple[str, ...]) -> list[str]:
    """Comma-separated texts, repeated options and @FILEs as one list."""
    items: list[str] = []
    for value in values:
        separator = "\n" if value.startswith("@") else ","
        found = [item.strip() for item in _text(value).split(separator)]
        items += [item for item in found if item or separator == ","]  # blank lines say nothing
    return items


def _model(model: str, revision: str | None) -> LLM:
    from dask_pcm.factcheck import demo_model
    from dask_pcm.inference import LLM

    return demo_model() if model == "demo" else LLM(model, revision=revision)


@contextmanager
def _report_of_failed(report: str | None, output: str) -> Iterator[None]:
    """Write the report of a run that fails, too."""
    from dask_pcm.runs import attach

    try:
        yield
    except Exception as error:
        # Others of ours come before the run: a report would be another run's.
        if report and (isinstance(error, FailedRowsError) or not isinstance(error, PCMError)):
            _write_report(report, attach(output).report)
        raise


def _show_sample(sample: Sample) -> None:
    import pandas as pd

    with pd.option_context("display.max_rows", 40, "display.width", 100):
        say(sample.frame.to_string(index=False, max_rows=40, max_colwidth=40))
    say(str(sample))
    for error in sample.errors:
        say(f"a failed row    {error}".replace("\n", "\\n"))


def _write_report(path: str, report: Report) -> None:
    Path(path).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
