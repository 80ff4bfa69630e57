"""Scenarios: pools, contexts, links and runs, read from YAML."""
