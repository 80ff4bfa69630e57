"""Where Dask calls in: plugins of scheduler, worker and nanny, and their installation."""

from dask_pcm.plugins.install import install

__all__ = ["install"]
