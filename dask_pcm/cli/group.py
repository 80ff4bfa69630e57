"""``dask-pcm`` is a group of commands; each kind of command has its own file."""

from __future__ import annotations

from typing import Any

import click

from dask_pcm.cli import outputs
from dask_pcm.cli.ask import ask
from dask_pcm.cli.errors import EXIT_INTERRUPTED, say
from dask_pcm.cli.profile import profile_context
from dask_pcm.cli.run import demo, run
from dask_pcm.cli.simulate import simulate_scenario
from dask_pcm.version import __version__


class _Commands(click.Group):
    """Ctrl-C ends a command with the code that ``errors`` documents, also while it imports."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Batch inference on GPUs that come and go."""


_COMMANDS = (
    run,
    outputs.show_status,
    outputs.pause,
    outputs.resume,
    outputs.cancel,
    ask,
    demo,
    profile_context,
    simulate_scenario,
)
for _command in _COMMANDS:
    main.add_command(_command)
