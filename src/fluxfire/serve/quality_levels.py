"""The quality levels of a request: run-time settings of the applied caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fluxfire import presets
from fluxfire.protocol import Pass, configured
from fluxfire.serve.wire import AS_APPLIED, LEVELS, STEPS, Level


def default_passes(device: str) -> tuple[Pass, ...]:
    """Return a service's default passes: `faithful`, and the cache of `balanced`, switched off.

    Nothing is lossy unless a request asks for it and so switches the cache on. A CPU gets the cache
    alone, since compiling takes longer there than it saves.

    Args:
        device: `"cuda"` or `"cpu"`.
    """
    passes = tuple(_set(p, None) if _is_tunable(p) else p for p in presets.balanced)
    return passes if device == "cuda" else tuple(filter(_is_tunable, passes))


def settings_by_level(applied: Sequence[Pass]) -> dict[Level, tuple[Pass, ...]]:
    """Return the levels that applied passes can give, with their settings for `fluxfire.using`.

    A level does the same as the preset of its name. So every cache of that preset must be applied.
    A level switches off applied caches that its preset does not have. With any other lossy pass,
    such as weights in eight bits, no level is possible.

    Args:
        applied: the passes, in order.
    """
    caches = [p for p in applied if _is_tunable(p)]
    if any(p.exactness == "lossy" for p in applied if p not in caches):
        return {}
    found: dict[Level, tuple[Pass, ...]] = {}
    for level in LEVELS:
        wanted = {p.name: p for p in presets.named(level) if _is_tunable(p)}
        settings = tuple(_set(p, wanted.pop(p.name, None)) for p in caches)
        if not wanted and all(map(_reachable, caches, settings)):
            found[level] = settings
    return found


def current_level(applied: Sequence[Pass]) -> str:
    """Return the level that matches the settings of the applied passes, or `AS_APPLIED`."""
    caches = tuple(p for p in applied if _is_tunable(p))
    for level, settings in settings_by_level(applied).items():
        if settings == caches:
            return level
    return AS_APPLIED


def describe_level(settings: Iterable[Pass], steps: int = STEPS) -> str:
    """Describe a level in a few words.

    Args:
        settings: the level's settings, from `settings_by_level`.
        steps: number of denoising steps of the edit.
    """
    most = sum(p.most_hits(steps) for p in settings if hasattr(p, "most_hits"))
    return f"lossy: skips up to {most} of {steps} steps" if most else "computes every step"


def _is_tunable(pass_: Pass) -> bool:
    return bool(getattr(pass_, "tunable", ())) and hasattr(pass_, "off")


def _set(applied: Any, wanted: Pass | None) -> Pass:
    off: Pass = applied.off()
    return off if wanted is None else wanted


def _reachable(applied: Pass, wanted: Pass) -> bool:
    """Whether all differences between two settings can change at run time."""
    return type(applied) is type(wanted) and configured(applied).fixed == configured(wanted).fixed
