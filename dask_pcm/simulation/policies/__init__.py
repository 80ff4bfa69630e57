"""The policies that are compared: ours, and those of the papers."""
