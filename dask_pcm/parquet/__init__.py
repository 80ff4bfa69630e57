"""Parquet input: which files, which schema, and rows as a stream."""
