"""From what the user asks for to passes: names, presets, files, and what is meant by mistakes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from fluxfire import presets
from fluxfire.errors import PlanError
from fluxfire.planning import recipes, registry
from fluxfire.planning.rules import by_stage, malformed, problems
from fluxfire.protocol import Pass
from fluxfire.text import bullets, spelled

Passes = str | Path | Iterable[Pass | str] | None


def resolve(passes: Passes) -> tuple[list[Pass], list[str]]:
    """Turn names into passes.

    Returns:
        The passes, and what is wrong with what was written: an entry that is wrong, but clear
        enough, is among the passes all the same.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or this is no list at all.
    """
    return _together(entries(passes))


def order(passes: Iterable[Pass | str]) -> list[Pass]:
    """Sort passes by stage, leaving passes of one stage as they stand.

    Args:
        passes: in any order; a string is the name of a pass, used with its defaults.

    Raises:
        PlanError: if something is not a pass, or no order can make the list valid
            (a pass twice, or two passes for one slot).
    """
    if not isinstance(passes, Iterable) or isinstance(passes, str):
        raise PlanError(f"order() takes a list of passes, not {passes!r}")
    given, wrong = resolve(passes)
    given = by_stage(given)
    if wrong := wrong or problems(given):
        raise PlanError("No order makes this list valid.\n" + bullets(wrong))
    return given


class Entry(NamedTuple):
    """An entry of a list.

    Attributes:
        meant: the passes that are meant.
        wrong: what is wrong with writing it so.
        written: as it stands there.
    """

    meant: tuple[Pass, ...]
    wrong: tuple[str, ...] = ()
    written: object = None


def entries(passes: Passes) -> list[Entry]:
    """Find out what each entry of a list means.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or this is no list at all.
    """
    if passes is None:
        passes = "faithful"
    if isinstance(passes, str | Path):
        passes = _named(passes)
    if not isinstance(passes, Iterable):
        meant = _read(passes).meant
        single = f"; did you mean passes=[{spelled(meant[0])}]?" if meant else ""
        raise PlanError(
            f"passes must be a list or a preset's name, not {passes!r}{single}", suggestion=meant
        )
    return [_read(entry) for entry in passes]


def _together(read: Iterable[Entry]) -> tuple[list[Pass], list[str]]:
    """Put together what entries mean, and what is wrong with them."""
    meant: list[Pass] = []
    wrong: list[str] = []
    for entry in read:
        meant += entry.meant
        wrong += entry.wrong
    return meant, wrong


def _read(entry: object) -> Entry:
    """Find out what an entry of a list means."""
    if isinstance(entry, str) and entry in presets.NAMES:
        said = f"{entry!r} is a preset, not a pass; write *presets.{entry} in its place"
        return Entry(presets.named(entry), (said,))
    if isinstance(entry, str):
        return _by_name(entry)
    if isinstance(entry, list | tuple):
        return _nested(entry)
    why = malformed(entry)
    if why is None:
        return Entry((cast("Pass", entry),))
    return Entry(_instance(entry) if inspect.isclass(entry) else (), (why,), entry)


def _by_name(name: str) -> Entry:
    """Find the pass of a name, or guess which is meant."""
    try:
        return _read(registry.make(name))
    except PlanError as error:
        close = None if name in registry.names() else registry.meant(name)
        guess = _by_name(close).meant if close else ()
        return Entry(guess, (str(error),), name)


def _nested(entry: Sequence[object]) -> Entry:
    """Take a list within the list apart."""
    meant, within = _together([_read(one) for one in entry])
    preset = next((name for name in presets.NAMES if presets.named(name) is entry), None)
    why = (
        f"presets.{preset} is a list within the list; write *presets.{preset}"
        if preset
        else malformed(entry)
    )
    return Entry(tuple(meant), (why or "", *within))


def _instance(cls: Callable[[], object]) -> tuple[Pass, ...]:
    """Return a pass of a class, with its defaults; nothing where there is none."""
    try:
        made = cls()
    except Exception:  # noqa: BLE001 - anyone's class; that it is one was complained of
        return ()
    return (cast("Pass", made),) if malformed(made) is None else ()


def chosen(preset: str | None, names: str | None) -> list[Pass]:
    """Find the passes that two options ask for.

    Args:
        preset: the name of a preset, or a file that tune wrote. It goes before names, which may
            be a default; `faithful` if both are None.
        names: names of passes in order, separated by commas; or `none`.

    Raises:
        PlanError: there is no such preset, file or pass.
    """
    if preset is not None or names is None:
        preset = preset or "faithful"
        try:
            return list(preset_or_file(preset))
        except PlanError as error:
            if _names_passes(preset):
                raise PlanError(f"{error}; did you mean --passes {preset}?") from None
            raise
    if names == "none":
        return []
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise PlanError(f"--passes {names!r} names no pass; write none for none")
    if (name := next((n for n in wanted if n in presets.NAMES), None)) is not None:
        own = ",".join(p.name for p in presets.named(name))
        raise PlanError(
            f"{name!r} is a preset, not a pass; write --preset {name}, or name its passes: {own}"
        )
    read = entries(wanted)
    meant, wrong = _together(read)
    if wrong:
        guessed = tuple(by_stage(meant)) if all(entry.meant for entry in read) else ()
        raise PlanError("; ".join(wrong), suggestion=guessed)
    return meant


def preset_or_file(name: str | Path) -> tuple[Pass, ...]:
    """Return the passes of a preset, or of a file that `fluxfire tune` wrote.

    Args:
        name: the preset's name; or the file, told by its suffix, `.json`, or by being a path.

    Raises:
        PlanError: there is no such preset, or the file cannot be read.
    """
    if isinstance(name, Path) or name.endswith(recipes.SUFFIX):
        return recipes.read(Path(name))
    return presets.named(name)


def _named(name: str | Path) -> tuple[Pass, ...]:
    """Return the same; of names that are passes', say so."""
    try:
        return preset_or_file(name)
    except PlanError as error:
        if isinstance(name, str) and _names_passes(name):
            meant = [part.strip() for part in name.split(",")]
            raise PlanError(f"{error}; did you mean passes={meant!r}?") from None
        raise


def _names_passes(text: str) -> bool:
    """Whether a text is names of passes, separated by commas."""
    known = registry.names()
    return all(part.strip() in known for part in text.split(","))
