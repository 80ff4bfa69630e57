"""``map_partitions``: an expression of a Dask DataFrame, and what its tasks do."""
