"""Saves lists of passes as JSON files. `optimize` takes such a file in place of a preset's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fluxfire.errors import PlanError
from fluxfire.planning import registry
from fluxfire.protocol import Pass, configured
from fluxfire.text import did_you_mean, write_atomically

SUFFIX = ".json"
_FORMAT = 1


def write(passes: Iterable[Pass], path: Path, **facts: object) -> None:
    """Save a list of passes with all their settings.

    Args:
        passes: the passes, in order.
        path: the file; its name must end in `.json`.
        facts: more entries for the file, such as how the list was found.

    Raises:
        PlanError: the file's name does not end in `.json`, a pass is not registered under its name,
            or a setting cannot be written as JSON.
        OSError: the file cannot be written.
    """
    passes = list(passes)
    if path.suffix != SUFFIX:
        raise PlanError(f"{path} must end in {SUFFIX}, or optimize() would read it as a preset")
    for pass_ in passes:
        if registry.find(pass_.name) is not type(pass_):
            raise PlanError(
                f"{pass_!r} cannot be saved: the name {pass_.name!r} is not registered as its "
                f"class, so fluxfire could not read the file again"
            )
    entries = [{"name": p.name, "settings": dict(configured(p).settings)} for p in passes]
    try:
        text = json.dumps(
            {"format": _FORMAT, "passes": entries, **facts},
            indent=1,
            default=_to_json,
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise PlanError(f"these passes cannot be saved: {error}") from None
    write_atomically(path, text + "\n")


def read(path: Path) -> tuple[Pass, ...]:
    """Read a list of passes.

    Raises:
        PlanError: the file cannot be read, names a pass that is not installed, or has settings that
            this version does not know.
    """
    entries = enumerate(read_entries(path), 1)
    return tuple(_read_pass(entry, f"{path}, pass {n}") for n, entry in entries)


def read_entries(path: Path) -> list[object]:
    """Read the entries of a file, one for each pass. Does not check them, and loads no torch.

    Raises:
        PlanError: the file cannot be read, or has another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:  # str(error) would name the file a second time
        raise PlanError(f"cannot read passes from {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"cannot read passes from {path}: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("passes"), list):
        raise PlanError(
            f'{path} holds no list of passes; it must be as fluxfire tune writes it: {{"passes": '
            f'[{{"name": "compile", "settings": {{}}}}]}}'
        )
    if content.get("format") != _FORMAT:
        raise PlanError(
            f"{path} has format {content.get('format')!r}, and this fluxfire reads {_FORMAT}; "
            f"save it again with fluxfire tune"
        )
    entries: list[object] = content["passes"]
    return entries


def _read_pass(entry: object, where: str) -> Pass:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise PlanError(f"{where} has no name: {entry!r}")
    settings = entry.get("settings", {})
    if not isinstance(settings, Mapping):
        raise PlanError(
            f"{where}: its settings are {settings!r}; they must be a JSON object with the "
            f"settings by name"
        )
    try:
        cls = registry.find(entry["name"])
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
    if is_dataclass(cls):
        known = [f.name for f in fields(cls) if f.init]
        if (unknown := next((n for n in settings if n not in known), None)) is not None:
            has = f"there are {', '.join(known)}" if known else "it has none"
            raise PlanError(
                f"{where}: {entry['name']} has no setting {unknown!r}; {has}"
                f"{did_you_mean(unknown, known)}"
            )
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}, {entry['name']}: {error}") from None


def _to_json(value: object) -> Any:
    """Convert a setting of a type that JSON lacks; the pass's constructor accepts the result."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    raise TypeError(f"JSON cannot represent {value!r}")
