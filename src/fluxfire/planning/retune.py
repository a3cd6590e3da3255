"""Finds out which settings `fluxfire.using` may change, and explains why others cannot change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from fluxfire.errors import PlanError
from fluxfire.planning.resolve import Passes, resolve
from fluxfire.protocol import Pass, configured
from fluxfire.runtime.generation import Live
from fluxfire.text import bullets, spell


def pair_live_settings(
    lives: Sequence[Live[Any]], applied: Sequence[Pass], settings: Passes
) -> list[tuple[Live[Any], Pass]]:
    """Pair each live setting with its new value.

    Args:
        lives: the live settings of the applied passes.
        applied: the applied passes.
        settings: passes with the new settings, or a preset's name.

    Raises:
        PlanError: some settings cannot change; the message lists all reasons.
    """
    requested, errors = resolve(settings)
    applied_by_name = {p.name: p for p in applied}
    live_by_name = {live.settings.name: live for live in lives}
    pairs = []
    for pass_ in requested:
        present = applied_by_name.get(pass_.name)
        if present is None:
            errors.append(f"{pass_.name} is not applied; using() changes settings only")
        elif (live := live_by_name.get(pass_.name)) is not None:
            if message := _fixed_settings_error(live.settings, pass_):
                errors.append(f"{pass_.name}: {message}")
            pairs.append((live, pass_))
        elif pass_ != present:
            errors.append(
                f"{pass_.name} has no settings that can change at run time; it is applied as "
                f"{spell(present)}: restore(pipe), and optimize with {spell(pass_)}"
            )
    if errors:
        raise PlanError(f"These settings cannot be used. Nothing was changed.\n{bullets(errors)}")
    return pairs


def _fixed_settings_error(present: Pass, requested: Pass) -> str:
    """Name the settings that differ but cannot change at run time; empty if there are none."""
    if type(present) is not type(requested) or not is_dataclass(requested):
        return f"{spell(requested)} is another kind of pass than the one applied"
    now = configured(present).settings
    names = [name for name, value in configured(requested).fixed.items() if now[name] != value]
    return f"{', '.join(names)} cannot change at run time" if names else ""
