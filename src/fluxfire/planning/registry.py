"""Finds passes by name: fluxfire's own passes, and the passes of installed packages.

A package registers a pass as an entry point of the group `fluxfire.passes`. The entry point's name
is the pass's name, and its value is the class:

    [project.entry-points."fluxfire.passes"]
    my-pass = "my_package:MyPass"
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from fluxfire.errors import PlanError
from fluxfire.protocol import Pass
from fluxfire.text import closest

GROUP = "fluxfire.passes"


def built_in() -> dict[str, type[Pass]]:
    """Return fluxfire's own passes by name."""
    from fluxfire import passes  # here, since they import torch

    classes = [getattr(passes, name) for name in passes.__all__]
    # `Schedule` is there too: the value of a setting, without `apply`.
    return {cls.name: cls for cls in classes if hasattr(cls, "apply")}


def third_party() -> dict[str, EntryPoint]:
    """Return the entry points of other packages' passes by name. Imports none of them."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Return the names of all passes, sorted."""
    return sorted({*built_in(), *third_party()})


def names_by_class() -> dict[str, str]:
    """Map the class names of fluxfire's own passes to the passes' names."""
    return {cls.__name__: name for name, cls in built_in().items()}


def find(name: str) -> Callable[..., Pass]:
    """Return the class of a pass.

    Args:
        name: the pass's name, or the name of its class.

    Raises:
        PlanError: there is no such pass, or its package cannot be imported.
    """
    ours, theirs = built_in(), third_party()
    name = names_by_class().get(name, name)
    if name in ours:
        return ours[name]
    if name not in theirs:
        close = closest_name(name)
        hint = (
            f"; did you mean {close!r}?"
            if close
            else f"; if a pass is in another package, that package must be installed first "
            f"(pip install …), and register the pass as an entry point of the group {GROUP!r}"
        )
        raise PlanError(f"there is no pass {name!r}; there are {', '.join(names())}{hint}")
    try:
        cls: Callable[..., Pass] = theirs[name].load()
    except Exception as error:
        raise PlanError(
            f"the pass {name!r} is registered as {theirs[name].value}, which cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    return cls


def closest_name(name: str) -> str | None:
    """Return the pass name most similar to a misspelt one; None if no name is similar."""
    return closest(name.replace("_", "-"), names())


def make(name: str) -> Pass:
    """Create the pass with this name, with default settings.

    Raises:
        PlanError: there is no such pass, its package cannot be imported, or a setting has no
            default.
    """
    cls = find(name)
    try:
        return cls()
    except Exception as error:
        raise PlanError(
            f"the pass {name!r} cannot be used by its name alone "
            f"({type(error).__name__}: {error}); give an instance, with its settings"
        ) from error
