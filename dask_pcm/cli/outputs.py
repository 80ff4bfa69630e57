"""``dask-pcm status, pause, resume, cancel`` act on an output from any machine that sees it."""

from __future__ import annotations

import json

import click

from dask_pcm.cli.errors import reported_errors, say


@click.command("status")
@click.argument("output", metavar="OUTPUT")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show_status(output: str, as_json: bool) -> None:
    """Show the progress of the run of OUTPUT, from any machine that sees it."""
    from dask_pcm.runs.handle import attach

    with reported_errors():
        run = attach(output)
        progress, report, driver = run.progress, run.report, run.driver
    if as_json:
        found = {"path": run.path, "driver": driver, "eta_s": progress.eta_s}
        click.echo(json.dumps({**found, **progress.as_dict(), "report": report.as_dict()}))
        return
    lines = {"output": run.path, "status": str(progress), "driver": driver or "none"}
    if report.error:
        lines["ended by"] = report.error
    for name, value in lines.items():
        say(f"{name:15} {value}")
    for error in report.errors:
        say(f"a failed row    {error}".replace("\n", "\\n"))


def _request(name: str, what: str) -> click.Command:
    """A command that calls the method `name` of an output's run."""

    @click.command(name, help=f"{what} the run of OUTPUT, from any machine that sees it.")
    @click.argument("output", metavar="OUTPUT")
    def ask(output: str) -> None:
        from dask_pcm.runs.handle import attach

        with reported_errors():
            getattr(attach(output), name)()

    return ask


pause = _request("pause", "Pause")
resume = _request("resume", "Resume")
cancel = _request("cancel", "Cancel")
