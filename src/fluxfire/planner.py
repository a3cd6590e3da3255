"""Which lists of passes make sense, and what to say of those that don't. No torch in here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from fluxfire.errors import PlanError
from fluxfire.protocol import BOUNDARIES, EXACTNESS, STAGES, Configured, Finding, Pass
from fluxfire.text import table


def configured(pass_: Pass) -> Configured:
    """Return what the other passes may know of this one."""
    settings: dict[str, Any] = {}
    if is_dataclass(pass_):
        settings = {f.name: getattr(pass_, f.name) for f in fields(pass_)}
    tunable = frozenset(getattr(pass_, "tunable", ()))
    return Configured(pass_.name, pass_.stage, settings, tunable)


def spelled(pass_: Pass) -> str:
    """Write a pass as a user would: its repr without the settings that are the defaults."""
    if not is_dataclass(pass_):
        return repr(pass_)
    given = (
        f"{f.name}={getattr(pass_, f.name)!r}"
        for f in fields(pass_)
        if f.init and f.repr and getattr(pass_, f.name) != f.default
    )
    return f"{type(pass_).__name__}({', '.join(given)})"


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
    return None


def problems(passes: Sequence[Pass], *, applied: int = 0) -> list[str]:
    """Say everything that is wrong with a list of well-formed passes as a list.

    Args:
        passes: the whole list, those already applied first.
        applied: how many of them are already applied, so that the words fit.
    """
    found = []
    highest = 0  # index of the pass with the latest stage so far
    names: dict[str, int] = {}
    slots: dict[str, Pass] = {}
    for index, pass_ in enumerate(passes):
        twin = names.setdefault(pass_.name, index)
        if twin != index:
            where = "already applied" if twin < applied else "in the list twice"
            found.append(
                f"{pass_.name} is {where}, as {passes[twin]!r}; to change its settings, "
                f"restore(pipe) and optimize again"
                if twin < applied
                else f"{pass_.name} is {where}, as {passes[twin]!r} and {pass_!r}; keep one"
            )
        elif pass_.slot is not None:
            holder = slots.setdefault(pass_.slot, pass_)
            if holder is not pass_:
                found.append(
                    f"{pass_.name} and {holder.name} both fill the slot "
                    f"{pass_.slot!r}, which has room for one; keep one of them"
                )
        latest = passes[highest]
        if STAGES.index(pass_.stage) >= STAGES.index(latest.stage):
            highest = index
            continue
        why = BOUNDARIES[pass_.stage]
        if highest < applied <= index:
            why += f"; {latest.name} is already applied: restore(pipe), and optimize with both"
        found.append(
            f"{pass_.name} (stage {pass_.stage}) must come before {latest.name} "
            f"(stage {latest.stage}): {why}"
        )
    return found


def order(passes: Iterable[Pass]) -> list[Pass]:
    """Sort passes by stage, leaving passes of one stage as they stand.

    Raises:
        PlanError: if something is not a pass, or no order can make the list valid
            (a pass twice, or two passes for one slot).
    """
    if not isinstance(passes, Iterable) or isinstance(passes, str):
        raise PlanError(f"order() takes a list of passes, not {passes!r}")
    given = list(passes)
    wrong = [why for p in given if (why := malformed(p)) is not None]
    if not wrong:
        given.sort(key=lambda p: STAGES.index(p.stage))
        wrong = problems(given)
    if wrong:
        raise PlanError("No order makes this list valid.\n" + _bullets(wrong))
    return given


def workable(passes: Iterable[Pass], applied: Sequence[Pass] = ()) -> list[Pass]:
    """Return the longest sensible rest of a bad list: each pass and slot once, in order."""
    latest = max((STAGES.index(p.stage) for p in applied), default=0)
    kept: list[Pass] = []
    for pass_ in passes:
        taken = any(
            p.name == pass_.name or (p.slot is not None and p.slot == pass_.slot)
            for p in (*applied, *kept)
        )
        late = STAGES.index(pass_.stage) < latest
        if not taken and not late:
            kept.append(pass_)
    return order(kept)


@dataclass(frozen=True)
class Step:
    """One pass of a plan, with what its `check` found."""

    pass_: Pass
    findings: tuple[Finding, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the pass cannot be applied."""
        return any(f.level == "error" for f in self.findings)


@dataclass(frozen=True)
class Plan:
    """A dry run: what `optimize` would do, or why it would not.

    Attributes:
        steps: the passes to apply, in order, with their findings.
        problems: what is wrong with the pipeline or with the list as a list.
        applied: passes that the pipeline already carries.
        suggestion: if the plan is not ok, a list that would be; None where there is none.
    """

    steps: tuple[Step, ...]
    problems: tuple[str, ...] = ()
    applied: tuple[Pass, ...] = ()
    suggestion: tuple[Pass, ...] | None = field(default=None)

    @property
    def ok(self) -> bool:
        """Whether `optimize` would go ahead."""
        return not self.problems and not any(s.refused for s in self.steps)

    def complaints(self) -> list[str]:
        """Everything that stands in the way, in words."""
        refusals = [
            f"{s.pass_.name}: {f}" for s in self.steps for f in s.findings if f.level == "error"
        ]
        return [*self.problems, *refusals]

    def raise_if_bad(self) -> None:
        """Raise `PlanError` with everything that is wrong, unless the plan is ok."""
        if self.ok:
            return
        lines = ["This list of passes cannot be applied. Nothing was changed."]
        lines += [_bullets(self.complaints()), *self._suggested()]
        raise PlanError("\n".join(lines))

    def _suggested(self) -> list[str]:
        if not self.suggestion:
            return []
        return [f"A list that would work: [{', '.join(map(spelled, self.suggestion))}]"]

    def __str__(self) -> str:
        rows = [(p.name, p.stage, p.exactness, "already applied") for p in self.applied]
        for step in self.steps:
            said = "; ".join(f"{f.level}: {f}" for f in step.findings) or "ready"
            rows.append((step.pass_.name, step.pass_.stage, step.pass_.exactness, said))
        text = table(("pass", "stage", "exactness", "verdict"), rows) if rows else "No passes."
        return "\n".join([text, *(f"error: {p}" for p in self.problems), *self._suggested()])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"  - {line}" for line in lines)
