"""Pipelines with random weights, and tokenizers that need no network."""
