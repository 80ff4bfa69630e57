"""The command line interface, ``dask-pcm``."""

from dask_pcm.cli.commands import main

__all__ = ["main"]
