"""What passes did to a pipeline, and the cost of each of its generations."""
