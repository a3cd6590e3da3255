"""Rules for lists of passes: what counts as a pass, and which passes fit together.

This module does not import torch.
"""

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
from fluxfire.text import spell


def why_not_a_pass(candidate: object) -> str | None:
    """Return the reason why an object is not a valid pass; None if it is valid."""
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
    assert isinstance(candidate, Pass)  # noqa: S101 - all members were found above
    return _invalid_member(candidate)


def _invalid_member(candidate: Pass) -> str | None:
    """Return a message about the first member with an invalid value; None if all are valid."""
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


def find_conflicts(passes: Sequence[Pass], *, applied: int = 0) -> Iterator[tuple[int, str]]:
    """Find duplicates, slots with two passes, and passes in the wrong order.

    Args:
        passes: valid passes, the applied ones first.
        applied: how many of them are already applied; the messages say so.

    Yields:
        The index of a pass that conflicts with an earlier one, and a message.
    """
    highest = 0  # index of the pass with the latest stage so far
    names: dict[str, int] = {}
    slots: dict[str, Pass] = {}
    for index, pass_ in enumerate(passes):
        twin = names.setdefault(pass_.name, index)
        if twin != index:
            yield index, _duplicate_message(passes[twin], pass_, applied=twin < applied)
            continue  # the user must remove one of the two, so the order does not matter
        if pass_.slot is not None:
            holder = slots.setdefault(pass_.slot, pass_)
            if holder is not pass_:
                both = f"{pass_.name} and {holder.name} both fill the slot {pass_.slot!r}"
                yield index, f"{both}, which has room for one; keep one of them"
        latest = passes[highest]
        if STAGES.index(pass_.stage) >= STAGES.index(latest.stage):
            highest = index
            continue
        why = BOUNDARIES[pass_.stage]
        if highest < applied <= index:
            why += f"; {latest.name} is already applied"
        first, then = (f"{p.name} (stage {p.stage})" for p in (pass_, latest))
        yield index, f"{first} must come before {then}: {why}"


def conflict_messages(passes: Sequence[Pass], *, applied: int = 0) -> list[str]:
    """Return the messages of `find_conflicts`, each once."""
    return list(dict.fromkeys(message for _, message in find_conflicts(passes, applied=applied)))


def _duplicate_message(first: Pass, second: Pass, *, applied: bool) -> str:
    if applied:
        return f"{second.name} is already applied, as {spell(first)}"
    both = spell(first) if first == second else f"{spell(first)} and {spell(second)}"
    return f"{second.name} is in the list twice, as {both}; keep one"


def sort_by_stage(passes: Iterable[Pass]) -> list[Pass]:
    """Sort passes by stage. Passes of the same stage keep their order."""
    return sorted(passes, key=lambda p: STAGES.index(p.stage))


def reasons_to_leave_out(passes: Sequence[Pass], applied: Sequence[Pass] = ()) -> list[str | None]:
    """Decide which passes of a bad list can stay, so that each name and slot occurs once.

    Args:
        passes: valid passes in any order; the first pass that fills a slot keeps it.
        applied: passes that the pipeline already carries.

    Returns:
        For each pass the reason to leave it out, or None. `sort_by_stage` makes a list without
        conflicts of the passes with None.
    """
    latest = max(applied, key=lambda p: STAGES.index(p.stage), default=None)
    kept: list[Pass] = []
    reasons: list[str | None] = []
    for pass_ in passes:
        reasons.append(_reason_to_leave_out(pass_, applied, kept, latest))
        if reasons[-1] is None:
            kept.append(pass_)
    return reasons


def _reason_to_leave_out(
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
