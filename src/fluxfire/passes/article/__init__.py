"""Passes of the article that fluxfire started from. They do not make a step faster."""
