"""``map_partitions``: a Dask DataFrame expression, and the code of its tasks."""
