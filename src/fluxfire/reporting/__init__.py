"""What was done to a pipeline, and what each of its generations cost."""
