"""Which settings `fluxfire.using` may change, and what to say of those that it may not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from fluxfire.errors import PlanError
from fluxfire.planning.resolve import Passes, resolve
from fluxfire.protocol import Pass, configured
from fluxfire.runtime.generation import Live
from fluxfire.text import bullets, spelled


def retuned(
    lives: Sequence[Live[Any]], applied: Sequence[Pass], settings: Passes
) -> list[tuple[Live[Any], Pass]]:
    """Pair live settings with what they shall become.

    Args:
        lives: the live settings of the applied passes.
        applied: the applied passes.
        settings: passes with the settings wanted, or a preset's name.

    Raises:
        PlanError: saying everything that stands in the way.
    """
    wanted, wrong = resolve(settings)
    by_name = {p.name: p for p in applied}
    live_by_name = {live.settings.name: live for live in lives}
    swaps = []
    for pass_ in wanted:
        present = by_name.get(pass_.name)
        if present is None:
            wrong.append(f"{pass_.name} is not applied; using() changes settings only")
        elif (live := live_by_name.get(pass_.name)) is not None:
            if fixed := _fixed(live.settings, pass_):
                wrong.append(f"{pass_.name}: {fixed}")
            swaps.append((live, pass_))
        elif pass_ != present:
            wrong.append(
                f"{pass_.name} has no settings that can change at run time; it is applied as "
                f"{spelled(present)}: restore(pipe), and optimize with {spelled(pass_)}"
            )
    if wrong:
        raise PlanError(f"These settings cannot be used. Nothing was changed.\n{bullets(wrong)}")
    return swaps


def _fixed(present: Pass, wanted: Pass) -> str:
    """Say which of the differences cannot be made at run time; nothing if all can."""
    if type(present) is not type(wanted) or not is_dataclass(wanted):
        return f"{spelled(wanted)} is another kind of pass than the one applied"
    now = configured(present).settings
    names = [name for name, value in configured(wanted).fixed.items() if now[name] != value]
    return f"{', '.join(names)} cannot change at run time" if names else ""
