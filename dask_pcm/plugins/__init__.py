"""Where Dask calls in: plugins of scheduler, worker and nanny, and their installation."""
