"""Vectors and linear maps in parameter space; nothing here knows a model."""
