"""Which lists of passes make sense, and what is wrong with the others. No torch in here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence

from fluxfire.protocol import (
    BOUNDARIES,
    EXACTNESS,
    STAGES,
    TRAITS,
    Finding,
    Pass,
    provided_traits,
)
from fluxfire.text import spelled


def malformed(candidate: object) -> str | None:
    """Say why an object is not a pass, or None if it is one."""
    if inspect.isclass(candidate):
        name = candidate.__name__
        return f"{name} is a class; pass an instance, {name}()"
    if isinstance(candidate, Finding | str | bytes):
        return f"{candidate!r} is not a pass"
    if isinstance(candidate, list | tuple):
        return f"{candidate!r} is a list within the list; write * before it"
    try:
        missing = [m for m in ("name", "stage", "slot", "exactness") if not hasattr(candidate, m)]
    except Exception as error:  # noqa: BLE001 - a property may raise anything
        return f"{candidate!r} is not a pass: it raised {type(error).__name__}: {error}"
    missing += [f"{m}()" for m in ("check", "apply") if not callable(getattr(candidate, m, None))]
    if missing:
        return f"{candidate!r} is not a pass: it has no {', '.join(missing)}"
    assert isinstance(candidate, Pass)  # noqa: S101 - the members were just looked at
    return _ill_described(candidate)


def _ill_described(candidate: Pass) -> str | None:
    """Say which of a pass's facts about itself is impossible, or None."""
    if not isinstance(candidate.name, str) or not candidate.name:
        return f"{candidate!r} has name {candidate.name!r}; a pass's name is a non-empty string"
    if candidate.stage not in STAGES:
        return f"{candidate!r} has stage {candidate.stage!r}; the stages are {', '.join(STAGES)}"
    if not isinstance(candidate.slot, str | None):
        return f"{candidate!r} has slot {candidate.slot!r}; a slot is a string or None"
    if candidate.exactness not in EXACTNESS:
        return (
            f"{candidate!r} has exactness {candidate.exactness!r}; "
            f"it must be one of {', '.join(EXACTNESS)}"
        )
    try:
        unknown = set(provided_traits(candidate)) - TRAITS
    except TypeError:
        return f"{candidate!r} has provides {candidate.provides!r}; it must be a set of traits"  # type: ignore[attr-defined]
    if unknown:
        return (
            f"{candidate!r} provides {', '.join(sorted(map(repr, unknown)))}, which is no trait; "
            f"there are {', '.join(sorted(TRAITS))}"
        )
    return None


def faults(passes: Sequence[Pass], *, applied: int = 0) -> Iterator[tuple[int, str]]:
    """Say everything that is wrong with a list of well-formed passes as a list.

    Args:
        passes: the whole list, those already applied first.
        applied: how many of them are already applied, so that the words fit.

    Yields:
        The index of a pass, and what is wrong with its being there.
    """
    highest = 0  # index of the pass with the latest stage so far
    names: dict[str, int] = {}
    slots: dict[str, Pass] = {}
    for index, pass_ in enumerate(passes):
        twin = names.setdefault(pass_.name, index)
        if twin != index:
            yield index, _twice(passes[twin], pass_, applied=twin < applied)
            continue  # one of them must go, and its order with it
        if pass_.slot is not None:
            holder = slots.setdefault(pass_.slot, pass_)
            if holder is not pass_:
                said = f"{pass_.name} and {holder.name} both fill the slot {pass_.slot!r}"
                yield index, f"{said}, which has room for one; keep one of them"
        latest = passes[highest]
        if STAGES.index(pass_.stage) >= STAGES.index(latest.stage):
            highest = index
            continue
        why = BOUNDARIES[pass_.stage]
        if highest < applied <= index:
            why += f"; {latest.name} is already applied"
        first, then = (f"{p.name} (stage {p.stage})" for p in (pass_, latest))
        yield index, f"{first} must come before {then}: {why}"


def problems(passes: Sequence[Pass], *, applied: int = 0) -> list[str]:
    """Say the same without the indices, and what is wrong with several passes once."""
    return list(dict.fromkeys(said for _, said in faults(passes, applied=applied)))


def _twice(first: Pass, second: Pass, *, applied: bool) -> str:
    if applied:
        return f"{second.name} is already applied, as {spelled(first)}"
    both = spelled(first) if first == second else f"{spelled(first)} and {spelled(second)}"
    return f"{second.name} is in the list twice, as {both}; keep one"


def by_stage(passes: Iterable[Pass]) -> list[Pass]:
    """Sort passes by stage, leaving passes of one stage as they stand."""
    return sorted(passes, key=lambda p: STAGES.index(p.stage))


def misfits(passes: Sequence[Pass], applied: Sequence[Pass] = ()) -> list[str | None]:
    """Choose the longest sensible rest of a bad list: each pass and slot once.

    Args:
        passes: well-formed, in any order; the first that fills a slot keeps it.
        applied: passes that the pipeline carries already.

    Returns:
        For each pass, why it must stay out, or None; what is left can be put in order.
    """
    latest = max(applied, key=lambda p: STAGES.index(p.stage), default=None)
    kept: list[Pass] = []
    found: list[str | None] = []
    for pass_ in passes:
        found.append(_misfit(pass_, applied, kept, latest))
        if found[-1] is None:
            kept.append(pass_)
    return found


def _misfit(
    pass_: Pass, applied: Sequence[Pass], kept: Sequence[Pass], latest: Pass | None
) -> str | None:
    for other in (*applied, *kept):
        if other.name == pass_.name:
            where = "applied" if other in applied else "in the list"
            return f"{pass_.name} is {where} already"
        if pass_.slot is not None and other.slot == pass_.slot:
            return f"{other.name} fills the slot {pass_.slot!r}"
    if latest is not None and STAGES.index(pass_.stage) < STAGES.index(latest.stage):
        return f"{latest.name}, which must come after it, is applied already"
    return None
