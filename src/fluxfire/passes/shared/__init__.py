"""Helpers that several passes use."""
