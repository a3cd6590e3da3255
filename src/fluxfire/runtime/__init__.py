"""One pipeline while it runs: its generations, its blocks, and what passes changed of it."""
