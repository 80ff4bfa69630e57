"""``dask-pcm profile`` measures a context on this machine's device."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dask_pcm.cli.errors import reported_errors, say
from dask_pcm.cli.inference import function_of

if TYPE_CHECKING:
    import pandas as pd

    from dask_pcm.context.context import Context
    from dask_pcm.inference.profiling import Point, Profile

_MIB = 1 << 20
_MOST_ROWS = 4096


@click.command("profile")
@click.argument("context", metavar="CONTEXT")
@click.option("--function", metavar="MODULE:NAME", help="Batches of NAME(frame, value) instead.")
@click.option("--input", "rows", metavar="PATH", help="Parquet file with rows for --function.")
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--json", "file", metavar="FILE", type=click.Path(dir_okay=False, writable=True))
def profile_context(
    context: str,
    function: str | None,
    rows: str | None,
    prompt_tokens: int,
    new_tokens: int,
    file: str | None,
) -> None:
    """Measure how rate and memory of CONTEXT grow with requests at a time, or rows of a batch.

    CONTEXT is a model's folder or hub id, or MODULE:NAME of a pcm.Context or FILE.py:NAME.
    """
    if (function is None) != (rows is None):
        raise click.UsageError("--function and --input belong together.")
    if file is not None and not os.access(Path(file).absolute().parent, os.W_OK):
        raise click.BadParameter(f"The profile cannot be written to {file!r}.")
    with reported_errors():
        from dask_pcm.inference.profiling import profile

        found = profile(
            _context_of(context),
            None if function is None else function_of(function),
            None if rows is None else _first_rows(rows),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            on_point=lambda point: say(_line(point), err=True),
        )
    _show(found)
    if file is not None:
        text = json.dumps(_as_dict(found), indent=1) + "\n"
        try:
            Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise click.BadParameter(
                f"The profile cannot be written to {file!r}: {error}."
            ) from error


def _context_of(given: str) -> Context:
    from dask_pcm.context.context import Context
    from dask_pcm.inference import LLM

    where, _, name = given.rpartition(":")
    if not where or not name or Path(given).exists():
        return LLM(given)
    found: Any = function_of(given, "CONTEXT")
    if not isinstance(found, Context):
        raise click.BadParameter(
            f"{given!r} has type {type(found).__name__}; expected a pcm.Context."
        )
    return found


def _first_rows(path: str) -> pd.DataFrame:
    import dask_pcm as pcm

    return pcm.read_parquet(path).head(_MOST_ROWS, npartitions=-1)


def _line(point: Point) -> str:
    text = f"{point.n} at a time: {point.rate:.3g} a second"
    if point.first_s is not None and point.between_s is not None:
        text += f", first token {point.first_s:.3g} s, between {1e3 * point.between_s:.3g} ms"
    return text


def _show(found: Profile) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.name} on {found.device}")
    names = [found.unit, "a second", "MiB at the peak"]
    is_model = found.points[0].first_s is not None
    if is_model:
        names += ["MiB beside it", "first token, p99 s", "between tokens, p99 ms"]
    for name in names:
        table.add_column(name, justify="right")
    for point in found.points:
        cells = [str(point.n), f"{point.rate:.4g}", f"{point.n_bytes / _MIB:,.0f}"]
        if point.first_s is not None and point.between_s is not None:
            cells += [
                f"{point.needed_bytes / _MIB:,.0f}",
                f"{point.first_s:.3g}",
                f"{1e3 * point.between_s:.3g}",
            ]
        table.add_row(*cells)
    Console().print(table)
    say(f"Knee at {found.unit} at a time: {found.knee.n}.")
    if is_model:
        best = found.best
        limits = "99 % of first tokens within 1 s, of the others within 100 ms"
        say(
            f"Best with {limits}: {best.rate:.3g} a second, {best.n} at a time."
            if best is not None
            else f"Even one at a time exceeds the limits ({limits})."
        )
    spare = found.spare_bytes
    if spare is None:
        say("The device has no budget (pcm.ladder.device.budget), so nothing is known to be spare.")
    elif spare >= 0:
        say(f"It leaves {spare / _MIB:,.0f} MiB of the device, which it can lend.")
    else:
        say(f"It needs {-spare / _MIB:,.0f} MiB beside its memory on the device.")


def _as_dict(found: Profile) -> dict[str, Any]:
    best = found.best
    return asdict(found) | {
        "knee": found.knee.n,
        "best": None if best is None else best.n,
        "spare_bytes": found.spare_bytes,
    }
