"""Where Dask calls in: plugins of scheduler, worker and nanny, and their installation."""

from dask_pcm.plugins.hold import acquire
from dask_pcm.plugins.install import explain, install, release, uninstall

__all__ = ["acquire", "explain", "install", "release", "uninstall"]
