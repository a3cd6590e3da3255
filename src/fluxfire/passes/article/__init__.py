"""Passes of the article that fluxfire began with. They add no speed of their own."""
