"""Lists of passes as JSON files, which `optimize` takes in place of a preset's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fluxfire.errors import PlanError
from fluxfire.planning import registry
from fluxfire.protocol import Pass, configured
from fluxfire.text import meant_hint, write_whole

SUFFIX = ".json"
_FORMAT = 1


def write(passes: Iterable[Pass], path: Path, **facts: object) -> None:
    """Save a list of passes with all their settings.

    Args:
        passes: in order.
        path: the file, which must end in `.json`.
        facts: what else the file shall say, such as how the list was found.

    Raises:
        PlanError: the name has another suffix, or a setting cannot be written as JSON.
        OSError: the file cannot be written.
    """
    passes = list(passes)
    if path.suffix != SUFFIX:
        raise PlanError(f"{path} must end in {SUFFIX}, by which optimize() knows it")
    for pass_ in passes:
        if registry.find(pass_.name) is not type(pass_):
            raise PlanError(
                f"{pass_!r} cannot be saved: the name {pass_.name!r} is not announced as its "
                f"class, so no file could give it back"
            )
    listed = [{"name": p.name, "settings": dict(configured(p).settings)} for p in passes]
    try:
        text = json.dumps(
            {"format": _FORMAT, "passes": listed, **facts},
            indent=1,
            default=_plain,
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise PlanError(f"these passes cannot be saved: {error}") from None
    write_whole(path, text + "\n")


def read(path: Path) -> tuple[Pass, ...]:
    """Read a list of passes.

    Raises:
        PlanError: the file cannot be read, names a pass that is not installed, or has
            settings that this version does not know.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:  # whose own text names the file again
        raise PlanError(f"cannot read passes from {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"cannot read passes from {path}: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON: {error}") from None
    if not isinstance(told, dict) or not isinstance(told.get("passes"), list):
        raise PlanError(
            f'{path} holds no list of passes; it must be as fluxfire tune writes it: {{"passes": '
            f'[{{"name": "compile", "settings": {{}}}}]}}'
        )
    if told.get("format") != _FORMAT:
        raise PlanError(
            f"{path} has format {told.get('format')!r}, and this fluxfire reads {_FORMAT}; "
            f"save it again with fluxfire tune"
        )
    return tuple(_pass(entry, f"{path}, pass {n}") for n, entry in enumerate(told["passes"], 1))


def _pass(entry: object, where: str) -> Pass:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise PlanError(f"{where} has no name: {entry!r}")
    settings = entry.get("settings", {})
    if not isinstance(settings, Mapping):
        raise PlanError(f"{where}: its settings are {settings!r}, not settings by name")
    try:
        cls = registry.find(entry["name"])
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
    if is_dataclass(cls):
        known = [f.name for f in fields(cls) if f.init]
        if (strange := next((n for n in settings if n not in known), None)) is not None:
            has = f"there are {', '.join(known)}" if known else "it has none"
            raise PlanError(
                f"{where}: {entry['name']} has no setting {strange!r}; {has}"
                f"{meant_hint(strange, known)}"
            )
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}, {entry['name']}: {error}") from None


def _plain(value: object) -> Any:
    """Write what JSON has no word for, and constructors take back."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"{value!r} is nothing that JSON can hold")
