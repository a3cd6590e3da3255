"""How Spark was trained: `python -m fluxfire.spark.training --help`."""
