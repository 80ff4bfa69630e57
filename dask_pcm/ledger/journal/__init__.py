"""The journal of an attempt at a unit: rows that are finished and not committed yet."""
