"""Our methods and other libraries' on the same weights and data: `python benchmarks/peers/run.py`."""
