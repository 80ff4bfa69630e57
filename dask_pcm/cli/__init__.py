"""The command ``dask-pcm``."""
