"""How a run feeds the gate: how many units it submits, of how many rows, and where it cuts them.

Runs and the simulator share it; it knows neither files nor Dask.
"""
