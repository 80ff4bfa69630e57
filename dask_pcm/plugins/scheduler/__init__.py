"""The gate in the scheduler process: Dask's hooks, and the services behind them."""
