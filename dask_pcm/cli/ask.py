"""``dask-pcm ask`` asks the model of a run, or of a cluster, and prints the answer as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from dask_pcm.cli.errors import EXIT_ERROR, EXIT_INTERRUPTED, reported_errors, say
from dask_pcm.cli.inference import text_of
from dask_pcm.errors import InstallError, PCMError, printable

if TYPE_CHECKING:
    from distributed import Client

    from dask_pcm.inference.questions.stream import Stream


@click.command("ask")
@click.argument("words", nargs=-1, required=True, metavar="[OUTPUT] QUESTION")
@click.option(
    "--scheduler", metavar="ADDRESS", help="Scheduler of a running cluster, or its connection file."
)
@click.option("--model", help="Folder or Hugging Face hub id; the only one known if left out.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1), metavar="N")
@click.option("--temperature", default=0.0, type=float, metavar="T", help="0: the likeliest token.")
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="Likeliest tokens to draw.")
@click.option("--top-p", default=1.0, type=float, metavar="P", help="Probability to draw from.")
@click.option("--seed", default=0, type=int, metavar="N", help="Another seed draws another text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT (repeatable).")
@click.option("--raw", is_flag=True, help="Take QUESTION as the whole prompt, without a chat.")
@click.option("--timeout", metavar="TIME", help="Give up after this time, such as 60 or 1m.")
def ask(
    words: tuple[str, ...],
    scheduler: str | None,
    model: str | None,
    raw: bool,
    timeout: str | None,
    **options: Any,
) -> None:
    """Ask the model of the run of OUTPUT, or of --scheduler; QUESTION is a text or @FILE.

    The workers answer beside their batches. The answer is printed as it arrives.
    """
    n_wanted = 1 if scheduler else 2
    if len(words) != n_wanted:
        what = "QUESTION alone" if scheduler else "OUTPUT and QUESTION, or --scheduler"
        raise click.UsageError(f"Give {what}; found {len(words)} arguments.")
    question = text_of(words[-1])
    try:
        with reported_errors():
            from dask_pcm.cli.cluster import client_of
            from dask_pcm.inference.questions.chat import checked_prompt

            checked_prompt(question)  # before anything is connected to
            run, where = ("", scheduler) if scheduler else _run_of(words[0])
            with client_of(None, where) as client:
                options |= {"chat": False if raw else None, "timeout": timeout}
                _print(_asked(client, question, run, model, options))
    except TimeoutError as error:
        say(f"Error: {error}", err=True)
        sys.exit(EXIT_ERROR)


def _run_of(output: str) -> tuple[str, str]:
    """The run that is at work on an output, and where its scheduler is."""
    from dask_pcm.runs.handle import attach

    run, where = attach(output).at_work
    if where.startswith("inproc"):
        raise InstallError(f"The scheduler of the run of {output!r} is inside its own process.")
    return run, where


def _asked(
    client: Client, question: str, run: str, model: str | None, options: dict[str, Any]
) -> Stream:
    from dask_pcm.inference import LLM
    from dask_pcm.inference.questions.models import models_of, named
    from dask_pcm.inference.questions.stream import open_stream
    from dask_pcm.plugins.install import install

    try:
        known = models_of(client, run)
    except InstallError:
        if run:
            raise
        say(f"Installing the toolkit on {client.scheduler.address}.", err=True)
        install(client)
        known = models_of(client, run)
    ref = named(known, model)
    if ref is None:  # none that is known has the name
        try:
            return LLM(str(model)).stream(question, client=client, **options)
        except PCMError as error:
            names = ", ".join(sorted(repr(one.name) for one in known))
            error.add_note(f"The cluster knows these models: {names or 'none'}.")
            raise
    about = {"client": client, "folder": None, "shows_text": False, "progress": True}
    return open_stream(ref, question, **about, **options)


def _print(stream: Stream) -> None:
    try:
        for piece in stream:
            click.echo(printable(piece), nl=False)
        click.echo()
    except KeyboardInterrupt:
        click.echo()
        say("Interrupted.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except (PCMError, TimeoutError):
        if stream.text:
            click.echo()
        raise
