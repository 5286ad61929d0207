"""Slow, obvious, float64 references. Nothing here imports the library."""
