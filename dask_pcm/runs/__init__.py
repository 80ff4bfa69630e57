"""Runs: what drives the work on an output from the client, and what a unit does on a worker.

Empty, so that workers import only what units need.
"""
