"""Passes by name: fluxfire's own, and those that installed packages announce.

A package announces a pass as an entry point of the group `fluxfire.passes`, whose name is
the pass's name and whose value is the class:

    [project.entry-points."fluxfire.passes"]
    my-pass = "my_package:MyPass"
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from fluxfire import passes
from fluxfire.errors import PlanError
from fluxfire.protocol import Pass

GROUP = "fluxfire.passes"


def own() -> dict[str, type[Pass]]:
    """Return fluxfire's own passes by name."""
    classes = [getattr(passes, name) for name in passes.__all__]
    return {cls.name: cls for cls in classes}


def announced() -> dict[str, EntryPoint]:
    """Return the passes that other packages announce, not yet imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Return the names of all passes, sorted."""
    return sorted({*own(), *announced()})


def find(name: str) -> Callable[..., Pass]:
    """Return the class of the pass with this name.

    Raises:
        PlanError: there is none, or its package cannot be imported.
    """
    ours, theirs = own(), announced()
    if name in ours:
        return ours[name]
    if name not in theirs:
        close = meant(name)
        hint = (
            f"; did you mean {close!r}?"
            if close
            else f"; another package's must be installed first (pip install …), and be announced "
            f"there as an entry point of the group {GROUP!r}"
        )
        raise PlanError(f"there is no pass {name!r}; there are {', '.join(names())}{hint}")
    try:
        cls: Callable[..., Pass] = theirs[name].load()
    except Exception as error:
        raise PlanError(
            f"the pass {name!r} is announced as {theirs[name].value}, which cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    return cls


def meant(name: str) -> str | None:
    """Guess which pass a wrong name means; None if it is like none."""
    by_class = {cls.__name__: own_name for own_name, cls in own().items()}
    if name in by_class:
        return by_class[name]
    close = get_close_matches(name.replace("_", "-"), names(), n=1)
    return close[0] if close else None


def make(name: str) -> Pass:
    """Return the pass with this name, with its defaults.

    Raises:
        PlanError: there is none, its package cannot be imported, or it has no defaults.
    """
    cls = find(name)
    try:
        return cls()
    except Exception as error:
        raise PlanError(
            f"the pass {name!r} cannot be used by its name alone "
            f"({type(error).__name__}: {error}); give an instance, with its settings"
        ) from error
