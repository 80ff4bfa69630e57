"""``dask-pcm simulate`` runs a scenario with the scheduling policy that real clusters use."""

from __future__ import annotations

from pathlib import Path

import click

from dask_pcm import simulation
from dask_pcm.cli.errors import reported_errors, say
from dask_pcm.simulation.serving import Serving

_MIN_WIDTH = 110


@click.command("simulate")
@click.argument("scenario", metavar="SCENARIO")
@click.option(
    "--policy",
    type=click.Choice([*simulation.POLICIES, "all"]),
    help=f"Ours ({simulation.OURS}, the default), one from the literature, or all in turn.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N")
@click.option(
    "--report",
    metavar="DIR",
    type=click.Path(file_okay=False, writable=True),
    help="Folder for CSV files and plots.",
)
def simulate_scenario(scenario: str, policy: str | None, seed: int, report: str | None) -> None:
    """Simulate SCENARIO, a YAML file or a scenario of the package, with a scheduling policy."""
    with reported_errors():
        played = simulation.read_any(scenario)
        if report:
            simulation.require_bokeh()
            _make_folder(report)
        if isinstance(played, Serving):
            if policy is not None:
                raise click.UsageError(
                    f"--policy: the scenario {scenario!r} has its own, all in turn."
                )
            _simulate_serving(played, seed, report)
            return
        policies = simulation.POLICIES if policy == "all" else [policy or simulation.OURS]
        results = [
            (variant, simulation.simulate(world, name, seed))
            for variant, world in simulation.variants(played)
            for name in policies
        ]
        from rich.console import Console

        width = max(_MIN_WIDTH, Console().width)  # rich truncates numbers in narrow columns
        Console(width=width).print(simulation.table(played.title, results))
        if report:
            simulation.write_report(Path(report), results)
            say(f"The report is in {Path(report, 'report.html')}")


def _make_folder(report: str) -> None:
    """Before anything is simulated."""
    try:
        Path(report).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"The report cannot be written to {report!r}: {error}.") from error


def _simulate_serving(spec: Serving, seed: int, report: str | None) -> None:
    """Requests to a device: all policies, at each rate."""
    # Not above: the engine's slices are those of ``inference``, which imports pandas.
    from rich.console import Console

    from dask_pcm.simulation.serving.device import POLICIES, play
    from dask_pcm.simulation.serving.results import serving_table, write_serving_report

    results = [play(spec, policy, rate, seed) for rate in spec.rates for policy in POLICIES]
    Console(width=max(_MIN_WIDTH, Console().width)).print(serving_table(spec, results))
    if report:
        write_serving_report(Path(report), spec, results)
        say(f"The report is in {Path(report, 'report.html')}")
