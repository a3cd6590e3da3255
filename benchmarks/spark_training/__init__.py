"""How Spark was trained: `PYTHONPATH=benchmarks python -m spark_training --help`."""
