"""What the commands print, and how they end: messages, exit codes, summaries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dask_pcm.errors import CancelledError, FailedRowsError, PCMError, printable

if TYPE_CHECKING:
    from dask_pcm.runs import Run

EXIT_FAILED_ROWS, EXIT_ERROR, EXIT_INTERRUPTED = 3, 1, 130


def say(text: str, err: bool = False) -> None:
    """Print what may quote files and rows."""
    click.echo(printable(text), err=err)


@contextmanager
def reported_errors(output: str) -> Iterator[None]:
    """Errors of ours as one message, without a traceback; Ctrl-C says how to go on."""
    try:
        yield
    except (CancelledError, FailedRowsError) as error:
        say(f"{error}", err=True)
        is_failed = isinstance(error, FailedRowsError)
        sys.exit(EXIT_FAILED_ROWS if is_failed else EXIT_INTERRUPTED)
    except PCMError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        say(f"Error: {error}{notes}", err=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        say(
            f"Interrupted. What was committed stays in {output}; run the same command to go on.",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)


def summarize(done: Run, is_kept: bool = True) -> None:
    report = done.report
    lines = {
        "output": done.path if is_kept else "not kept; --output DIR keeps it",
        "rows": f"{report.rows:,} ({report.rows_failed:,} failed, {report.rows_resumed:,} resumed)",
        "rows/s": f"{report.rows_per_s:,.0f}",
        "context loads": f"{report.context_loads} on {report.workers} workers",
        "committed by": report.committed_by,
        "seconds": f"{report.total_s:.1f} in all, {report.load_s:.1f} loading,"
        f" {report.infer_s:.1f} inferring (summed over workers)",
    }
    for name, value in lines.items():
        say(f"{name:15} {value}")
    for error in report.errors:
        say(f"a failed row    {error}".replace("\n", "\\n"))
