"""Edits of live objects that can be undone. Nothing in here knows what a pipeline is."""
