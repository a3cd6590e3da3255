"""Pipelines to work on: loaded from a folder or the hub, or built with random weights."""
