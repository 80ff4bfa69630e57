"""The packed, paged engine: tokens of many rows in one forward, keys and values in pages."""
