"""From what the user asks for to passes: names, presets, files, and what is meant by mistakes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from fluxfire import plugins, presets, recipes
from fluxfire.errors import PlanError
from fluxfire.protocol import Pass
from fluxfire.rules import by_stage, malformed, problems
from fluxfire.text import bullets

Passes = str | Path | Iterable[Pass | str] | None


def resolve(passes: Passes) -> tuple[list[Pass], list[str]]:
    """Turn names into passes.

    Returns:
        The passes, and what is wrong with what was written: an entry that is wrong, but clear
        enough, is among the passes all the same.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or this is no list at all.
    """
    read = entries(passes)
    return [p for entry in read for p in entry.meant], [w for entry in read for w in entry.wrong]


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
    """An entry of a list: the passes that are meant, and what is wrong with writing it so."""

    meant: tuple[Pass, ...]
    wrong: tuple[str, ...] = ()


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
        single = f"; did you mean passes=[{passes!r}]?" if malformed(passes) is None else ""
        raise PlanError(f"passes must be a list or a preset's name, not {passes!r}{single}")
    return [_read(entry) for entry in passes]


def _read(entry: object) -> Entry:
    """Find out what an entry of a list means."""
    if isinstance(entry, str) and entry in presets.NAMES:
        said = f"{entry!r} is a preset, not a pass; write *presets.{entry} in its place"
        return Entry(presets.named(entry), (said,))
    if isinstance(entry, str):
        try:
            return _read(plugins.make(entry))
        except PlanError as error:
            return Entry((), (str(error),))
    if isinstance(entry, list | tuple):
        return _nested(entry)
    why = malformed(entry)
    if why is None:
        return Entry((cast("Pass", entry),))
    return Entry(_instance(entry) if inspect.isclass(entry) else (), (why,))


def _nested(entry: Sequence[object]) -> Entry:
    """Take a list within the list apart."""
    inner = [_read(one) for one in entry]
    preset = next((name for name in presets.NAMES if presets.named(name) is entry), None)
    why = (
        f"presets.{preset} is a list within the list; write *presets.{preset}"
        if preset
        else malformed(entry)
    )
    wrong = (why or "", *(line for one in inner for line in one.wrong))
    return Entry(tuple(p for one in inner for p in one.meant), wrong)


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
        return list(preset_or_file(preset or "faithful"))
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
    return [plugins.make(name) for name in wanted]


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
    """Return the same; of a name that is a pass's, say so."""
    try:
        return preset_or_file(name)
    except PlanError as error:
        if name in plugins.own() or name in plugins.announced():
            raise PlanError(f"{error}; did you mean passes=[{name!r}]?") from None
        raise
