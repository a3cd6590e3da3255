"""Rules for lists of passes: what counts as a pass, and which passes fit together.

This module does not import torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from fluxfire.protocol import (
    BOUNDARIES,
    EXACTNESS,
    OPTIONAL,
    STAGES,
    TRAITS,
    Finding,
    Pass,
    configured,
)
from fluxfire.text import spell

_DATA, _METHODS = ("name", "stage", "slot", "exactness"), ("check", "apply")
_SIMILAR = 0.85  # difflib's ratio: "tuneable" and "tunable" have 0.93, "storage" and "stage" 0.83


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
        missing = [m for m in _DATA if not hasattr(candidate, m)]
    except Exception as error:  # noqa: BLE001 - a property may raise anything
        return f"{candidate!r} is not a pass: it raised {type(error).__name__}: {error}"
    missing += [f"{m}()" for m in _METHODS if not callable(getattr(candidate, m, None))]
    if missing:
        similar = misspelt_members(candidate)
        meant, written = (", ".join(map("`{}`".format, x)) for x in (similar.values(), similar))
        hint = f"; did you mean {meant}? You wrote {written}" if similar else ""
        return f"{candidate!r} is not a pass: it has no {', '.join(missing)}{hint}"
    assert isinstance(candidate, Pass)  # noqa: S101 - all members were found above
    return _invalid_member(candidate) or _invalid_optional_member(candidate)


def misspelt_members(candidate: object) -> dict[str, str]:
    """Find public attributes of an object's class that look like misspelt members of a pass.

    An attribute is no misspelling if the class that defines it also defines the similar member.

    Returns:
        The member that each such attribute resembles.
    """
    members = (*_DATA, *_METHODS, *OPTIONAL)
    found: dict[str, str] = {}
    for cls in type(candidate).__mro__:
        lacking = [member for member in members if member not in vars(cls)]
        for name in vars(cls):
            if not name.startswith("_") and name not in members:
                for member in get_close_matches(name, lacking, n=1, cutoff=_SIMILAR):
                    found[name] = member
    return found


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
    return None


def _invalid_optional_member(candidate: Any) -> str | None:
    """Return a message about the first optional member that is invalid; None if all are valid."""
    provides = getattr(candidate, "provides", ())
    if (traits := _set_of_names(provides)) is None:
        return f"{candidate!r} has provides {provides!r}; it must be a set of traits"
    if unknown := traits - TRAITS:
        return (
            f"{candidate!r} provides {', '.join(sorted(map(repr, unknown)))}, which is no trait; "
            f"there are {', '.join(sorted(TRAITS))}"
        )
    tunable = getattr(candidate, "tunable", ())
    if (names := _set_of_names(tunable)) is None:
        return f"{candidate!r} has tunable {tunable!r}; it must be a set of names of its fields"
    fields = configured(candidate).settings
    if unknown := names - set(fields):
        return (
            f"{candidate!r} has tunable {', '.join(sorted(map(repr, unknown)))}, which is no field "
            f"of it; its fields are {', '.join(fields) or 'none'}"
        )
    # A pass that is not tunable may have an `off` of its own; `check_pass` reports it.
    if names and hasattr(candidate, "off") and not _can_be_called(candidate.off):
        return f"{candidate!r} has an off that cannot be called without arguments"
    after_warmup = getattr(candidate, "after_warmup", None)
    if after_warmup is not None and not _can_be_called(after_warmup, None):
        return f"{candidate!r} has an after_warmup that cannot be called with one argument, tx"
    return None


def _set_of_names(names: object) -> set[Any] | None:
    """Return names as a set; None for text, and for an iterator, which can be read only once."""
    if not isinstance(names, Iterable) or isinstance(names, str | bytes | Iterator):
        return None
    try:
        return set(names)
    except TypeError:  # something in it cannot be hashed
        return None


def _can_be_called(method: Any, *arguments: object) -> bool:
    """Whether a method can be called with these arguments, as far as its signature tells."""
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


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
