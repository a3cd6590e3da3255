"""Which quality a request can have: settings of caches that are applied already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fluxfire import presets
from fluxfire.protocol import Pass, configured
from fluxfire.serve.wire import AS_APPLIED, LEVELS, STEPS, Level


def usual(device: str) -> tuple[Pass, ...]:
    """Return what a service applies by default: `faithful`, and the cache of `balanced`, off.

    Nothing lossy happens unless a request asks for it: the cache is there to be switched on. A CPU
    gets the cache alone, since compiling takes longer there than it saves.

    Args:
        device: `"cuda"` or `"cpu"`.
    """
    passes = tuple(_set(p, None) if _is_tunable(p) else p for p in presets.balanced)
    return passes if device == "cuda" else tuple(filter(_is_tunable, passes))


def offered(applied: Sequence[Pass]) -> dict[Level, tuple[Pass, ...]]:
    """Return the levels that applied passes can give, as settings for `fluxfire.using`.

    A level is what the preset of its name does. So each cache of that preset must be there; a
    cache that the preset has not is switched off; and what is lossy otherwise, such as weights in
    eight bits, rules all levels out.

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


def current(applied: Sequence[Pass]) -> str:
    """Return the level that applied passes are set to, or `AS_APPLIED`."""
    caches = tuple(p for p in applied if _is_tunable(p))
    for level, settings in offered(applied).items():
        if settings == caches:
            return level
    return AS_APPLIED


def described(settings: Iterable[Pass], steps: int = STEPS) -> str:
    """Say in a few words what a level does.

    Args:
        settings: the level's, as `offered` returns them.
        steps: how many steps the edit has.
    """
    most = sum(p.most_hits(steps) for p in settings if hasattr(p, "most_hits"))
    return f"lossy: skips up to {most} of {steps} steps" if most else "computes every step"


def _is_tunable(pass_: Any) -> bool:
    return bool(getattr(pass_, "tunable", ())) and hasattr(pass_, "off")


def _set(applied: Any, wanted: Pass | None) -> Pass:
    off: Pass = applied.off()
    return off if wanted is None else wanted


def _reachable(applied: Pass, wanted: Pass) -> bool:
    """Whether all that differs can change at run time."""
    return type(applied) is type(wanted) and configured(applied).fixed == configured(wanted).fixed
