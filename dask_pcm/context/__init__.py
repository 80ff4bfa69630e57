"""Recipes of live objects: what builds them, and what identifies them."""
