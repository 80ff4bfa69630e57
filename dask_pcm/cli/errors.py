"""Commands print errors as one message without a traceback, and exit with a documented code.

Exit codes: 0 success, 1 error, 3 too many failed rows, 130 interrupted or cancelled.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from dask_pcm.errors import FailedRowsError, PCMError, RunCancelledError, printable

if TYPE_CHECKING:
    from dask_pcm.runs.handle import Run

#: How batch systems, service managers and terminals end a command.
_ENDS = (signal.SIGTERM, signal.SIGHUP)
EXIT_FAILED_ROWS, EXIT_ERROR, EXIT_INTERRUPTED = 3, 1, 130


def say(text: str, err: bool = False) -> None:
    """Print a text that may quote files and rows, with control characters escaped."""
    click.echo(printable(text), err=err)


@contextmanager
def reported_errors(output: str | None = None) -> Iterator[None]:
    """Print errors of dask_pcm as one message and exit; on Ctrl-C, print how to resume.

    Without an `output` there is nothing to resume.

    The end of a session (SIGTERM, SIGHUP) is as good as Ctrl-C: a cluster of the command's own ends
    its jobs, also those that have not begun.
    """
    is_main = threading.current_thread() is threading.main_thread()
    given = [number for number in _ENDS if signal.getsignal(number) is signal.SIG_DFL]
    ends = given if is_main else []  # not where they are ignored, as by nohup
    for number in ends:
        signal.signal(number, _interrupt)
    try:
        yield
    except (RunCancelledError, FailedRowsError) as error:
        say(f"{error}", err=True)
        is_failed = isinstance(error, FailedRowsError)
        sys.exit(EXIT_FAILED_ROWS if is_failed else EXIT_INTERRUPTED)
    except PCMError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        say(f"Error: {error}{notes}", err=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        kept = f" Committed rows are kept in {output}; rerun the same command to resume."
        say(f"Interrupted.{kept if output else ''}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: Any) -> None:
    """Do as on Ctrl-C, which a shell has what it starts in the background ignore."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def summarize(done: Run, is_kept: bool = True) -> None:
    """Print the report of a finished run; `is_kept` is False for a temporary output."""
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
