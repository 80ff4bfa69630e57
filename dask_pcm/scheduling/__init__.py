"""The gate: pure policy. No I/O, no clock, no asyncio, no torch, no distributed."""
