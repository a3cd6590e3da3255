"""Reversible edits of live objects. This package knows nothing about pipelines."""
