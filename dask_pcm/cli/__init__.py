"""The command line interface, ``dask-pcm``."""

from dask_pcm.cli.group import main

__all__ = ["main"]
