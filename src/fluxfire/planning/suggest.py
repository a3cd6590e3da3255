"""Finds a list that works, close to a list that does not. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fluxfire.planning.plan import Step
from fluxfire.planning.rules import reasons_to_leave_out, sort_by_stage, why_not_a_pass
from fluxfire.protocol import Finding, Pass, provided_traits
from fluxfire.text import spell

Check = Callable[[Sequence[Pass]], Sequence[Step]]


@dataclass(eq=False)
class _Candidate:
    """A pass that the user requested, and what the search does with it.

    Attributes:
        requested: the pass as the user wrote it.
        pass_: the requested pass, or the one that a finding offers in its place.
        reason: why the requested pass cannot stay; empty until a reason is found.
        given_up: whether the search left the pass out, which frees its slot.
    """

    requested: Pass
    pass_: Pass
    reason: str = ""
    given_up: bool = False

    def explain(self, *, kept: bool) -> str:
        """Say why the suggestion lacks the requested pass, and what it has instead."""
        instead = f"; in its place: {spell(self.pass_)}" if kept else ""
        return f"{spell(self.requested)}, because {self.reason}{instead}"


def suggest(
    requested: Sequence[Pass], applied: Sequence[Pass], check: Check
) -> tuple[tuple[Pass, ...] | None, tuple[str, ...]]:
    """Find a list that can be applied on top of the applied passes.

    Each round checks a list without conflicts. If a pass refuses, the search changes one thing, as
    the findings advise, and tries again. It gives up a pass that refuses before a pass that only
    lacks a slot. So the result does not depend on which of two passes came first.

    Example: the list is A, B, and both fill one slot. The first round checks [A]. If A refuses the
    pipeline, the search gives A up, and the second round checks [B].

    Args:
        requested: valid passes in any order.
        applied: passes that the pipeline already carries.
        check: runs the check of every pass of a list.

    Returns:
        The list, or None if no pass is left; and one line for each requested pass that is not in
        it, with the reason.
    """
    candidates = [_Candidate(p, p) for p in requested]
    while True:
        left = [c for c in candidates if not c.given_up]
        reasons = reasons_to_leave_out([c.pass_ for c in left], applied)
        fitting = {
            id(c.pass_): c for c, reason in zip(left, reasons, strict=True) if reason is None
        }
        steps = check(sort_by_stage(c.pass_ for c in fitting.values()))
        refused = next((n for n, step in enumerate(steps) if step.refused), None)
        if refused is None:
            break
        earlier = [fitting[id(step.pass_)] for step in steps[:refused]]
        _follow_advice(earlier, fitting[id(steps[refused].pass_)], steps[refused].findings)
    if not steps:
        return None, ()
    for candidate, reason in zip(left, reasons, strict=True):
        candidate.reason = candidate.reason or reason or ""
    kept = set(fitting.values())
    changed = [c for c in candidates if c not in kept or c.pass_ is not c.requested]
    left_out = tuple(c.explain(kept=c in kept) for c in changed)
    return tuple(step.pass_ for step in steps), left_out


def _follow_advice(
    earlier: Sequence[_Candidate], refused: _Candidate, findings: Sequence[Finding]
) -> None:
    """Change one thing as the errors of a refused pass advise.

    In this order: take the pass that a finding offers instead (once), give up the earlier passes
    that provide the trait in the way, or give up the refused pass.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in errors:
        offered = finding.instead
        is_first_offer = refused.pass_ is refused.requested
        if offered is not None and why_not_a_pass(offered) is None and is_first_offer:
            refused.pass_, refused.reason = offered, finding.message
            return
        providers = [c for c in earlier if finding.trait in provided_traits(c.pass_)]
        for candidate in providers:
            candidate.given_up = True
            refusal = f"{refused.pass_.name} refuses it: {finding.message}"
            candidate.reason = candidate.reason or refusal
        if providers:
            return
    refused.given_up, refused.reason = True, refused.reason or errors[0].message
