"""The command ``dask-pcm``."""

from dask_pcm.cli.commands import main

__all__ = ["main"]
