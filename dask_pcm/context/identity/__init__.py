"""Digests of functions, classes and values: equal in every process for the same code."""
