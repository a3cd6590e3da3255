"""Passes that nobody has measured on a GPU yet.

A pass belongs here if `check_pass` accepts it and its author has no H100. Its docstring says "Not
measured yet." where others give a figure. No preset contains it, and its class may change or go
between two releases. Otherwise it is a pass like the others: `fluxfire.passes` names it.

It leaves this folder when somebody measures it: `benchmarks/each_pass.py --full` for speed and
memory, `benchmarks/lora.py` for LoRA, both results committed. Then the file moves to `passes/`, and
the docstring gives the figure. A pass that gains nothing is removed, or lives on in a package of
its own. The page "Add a pass" of the documentation lists the steps.
"""
