"""Tasks at the gate: found, parked, dispatched, and lost with their workers."""
