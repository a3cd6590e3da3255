"""Turns what a user writes into passes: names, presets, files, and guesses for mistakes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from fluxfire import presets
from fluxfire.errors import PlanError
from fluxfire.planning import recipes, registry
from fluxfire.planning.rules import conflict_messages, sort_by_stage, why_not_a_pass
from fluxfire.protocol import Pass
from fluxfire.text import bullets, spell

Passes = presets.PresetName | str | Path | Iterable[Pass | str]


def resolve(passes: Passes) -> tuple[list[Pass], list[str]]:
    """Turn names into passes.

    Returns:
        The passes, and messages about wrong entries. If a wrong entry shows which pass the user
        meant, the list has that pass, too.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or `passes` is no list.
    """
    return _merge(resolve_entries(passes))


def order(passes: Iterable[Pass | str]) -> list[Pass]:
    """Sort passes by stage. Passes of the same stage keep their order.

    Args:
        passes: in any order; a string is the name of a pass with default settings.

    Raises:
        PlanError: an entry is not a pass, or no order makes the list valid, because a pass occurs
            twice or two passes fill one slot.
    """
    if not isinstance(passes, Iterable) or isinstance(passes, str):
        raise PlanError(f"order() takes a list of passes, not {passes!r}")
    resolved, errors = resolve(passes)
    resolved = sort_by_stage(resolved)
    if errors := errors or conflict_messages(resolved):
        raise PlanError("No order makes this list valid.\n" + bullets(errors))
    return resolved


class Entry(NamedTuple):
    """One entry of a user's list, and what it means.

    Attributes:
        passes: the passes that the entry means; a guess if the entry is wrong.
        errors: messages about what is wrong with the entry.
        written: the entry as the user wrote it.
    """

    passes: tuple[Pass, ...]
    errors: tuple[str, ...] = ()
    written: object = None


def resolve_entries(passes: Passes) -> list[Entry]:
    """Find out what each entry of a list means.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or `passes` is no list.
    """
    if isinstance(passes, str | Path):
        passes = _preset_or_file_with_hint(passes)
    if not isinstance(passes, Iterable):
        guess = _resolve_entry(passes).passes
        hint = f"; did you mean passes=[{spell(guess[0])}]?" if guess else ""
        raise PlanError(
            f"passes must be a list or a preset's name, not {passes!r}{hint}", suggestion=guess
        )
    return [_resolve_entry(entry) for entry in passes]


def _merge(entries: Iterable[Entry]) -> tuple[list[Pass], list[str]]:
    """Concatenate the passes of all entries, and their errors."""
    passes: list[Pass] = []
    errors: list[str] = []
    for entry in entries:
        passes += entry.passes
        errors += entry.errors
    return passes, errors


def _resolve_entry(entry: object) -> Entry:
    if isinstance(entry, str) and entry in presets.NAMES:
        error = f"{entry!r} is a preset, not a pass; write *presets.{entry} in its place"
        return Entry(presets.named(entry), (error,))
    if isinstance(entry, str):
        return _resolve_name(entry)
    if isinstance(entry, list | tuple):
        return _resolve_nested_list(entry)
    why = why_not_a_pass(entry)
    if why is None:
        return Entry((cast("Pass", entry),))
    return Entry(_default_instance(entry) if inspect.isclass(entry) else (), (why,), entry)


def _resolve_name(name: str) -> Entry:
    """Find the pass with a name. If there is none, guess which pass the user meant."""
    try:
        return _resolve_entry(registry.make(name))
    except PlanError as error:
        close = None if name in registry.names() else registry.closest_name(name)
        guess = _resolve_name(close).passes if close else ()
        return Entry(guess, (str(error),), name)


def _resolve_nested_list(entry: Sequence[object]) -> Entry:
    """Resolve a list inside the list: an error, but its passes are what the user meant."""
    passes, errors = _merge([_resolve_entry(one) for one in entry])
    preset = next((name for name in presets.NAMES if presets.named(name) is entry), None)
    why = (
        f"presets.{preset} is a list within the list; write *presets.{preset}"
        if preset
        else why_not_a_pass(entry)
    )
    return Entry(tuple(passes), (why or "", *errors))


def _default_instance(cls: Callable[[], object]) -> tuple[Pass, ...]:
    """Create a pass of a class with default settings; return () if that is impossible."""
    try:
        made = cls()
    except Exception:  # noqa: BLE001 - anybody's class; the entry has an error message already
        return ()
    return (cast("Pass", made),) if why_not_a_pass(made) is None else ()


def passes_from_options(preset: str | None, names: str | None) -> list[Pass]:
    """Return the passes that the options `--preset` and `--passes` ask for.

    Args:
        preset: the name of a preset, or a file that `fluxfire tune` or `calibrate` wrote. It
            overrides `names`, which may be a default. If both are None, the preset is `faithful`.
        names: names of passes in order, separated by commas; or `none`.

    Raises:
        PlanError: there is no such preset, file or pass.
    """
    if preset is not None or names is None:
        preset = preset or "faithful"
        try:
            return list(preset_or_file(preset))
        except PlanError as error:
            if _lists_pass_names(preset):
                raise PlanError(f"{error}; did you mean --passes {preset}?") from None
            raise
    if names == "none":
        return []
    requested = [name.strip() for name in names.split(",") if name.strip()]
    if not requested:
        raise PlanError(f"--passes {names!r} names no pass; write none for none")
    if (name := next((n for n in requested if n in presets.NAMES), None)) is not None:
        own = ",".join(p.name for p in presets.named(name))
        raise PlanError(
            f"{name!r} is a preset, not a pass; write --preset {name}, or name its passes: {own}"
        )
    entries = resolve_entries(requested)
    passes, errors = _merge(entries)
    if errors:
        guess = tuple(sort_by_stage(passes)) if all(entry.passes for entry in entries) else ()
        raise PlanError("; ".join(errors), suggestion=guess)
    return passes


def preset_or_file(name: str | Path) -> tuple[Pass, ...]:
    """Return the passes of a preset, or of a file that `fluxfire tune` or `calibrate` wrote.

    Args:
        name: a preset's name or a file. A `Path`, or a string that ends in `.json`, is a file.

    Raises:
        PlanError: there is no such preset, or the file cannot be read.
    """
    if isinstance(name, Path) or name.endswith(recipes.SUFFIX):
        return recipes.read(Path(name))
    return presets.named(name)


def _preset_or_file_with_hint(name: str | Path) -> tuple[Pass, ...]:
    """Like `preset_or_file`, but if the string lists pass names, the error says so."""
    try:
        return preset_or_file(name)
    except PlanError as error:
        if isinstance(name, str) and _lists_pass_names(name):
            passes = [part.strip() for part in name.split(",")]
            raise PlanError(f"{error}; did you mean passes={passes!r}?") from None
        raise


def _lists_pass_names(text: str) -> bool:
    """Whether a string consists of names of passes, separated by commas."""
    known = {*registry.names(), *registry.names_by_class()}
    return all(part.strip() in known for part in text.split(","))
