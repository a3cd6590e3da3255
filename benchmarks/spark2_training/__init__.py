"""How Spark was trained: `PYTHONPATH=benchmarks python -m spark2_training --help`."""
