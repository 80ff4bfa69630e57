"""Pools of workers: what their jobs are, and a cluster that keeps them running."""
