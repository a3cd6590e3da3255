"""From a list of passes that cannot be applied to one that can, by trying. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fluxfire.planning.plan import Step
from fluxfire.planning.rules import by_stage, malformed, misfits
from fluxfire.protocol import Finding, Pass, provided_traits
from fluxfire.text import spelled

Check = Callable[[Sequence[Pass]], Sequence[Step]]


@dataclass(eq=False)
class _Candidate:
    """A pass that was asked for.

    Attributes:
        asked: it.
        pass_: the same, or what a finding offered in its place.
        why: what stands in its way, once that is found.
        out: whether it was given up, and another may have its slot.
    """

    asked: Pass
    pass_: Pass
    why: str = ""
    out: bool = False

    def told(self, *, kept: bool) -> str:
        """Say what became of a pass that is not in the suggestion."""
        stead = f"; in its place: {spelled(self.pass_)}" if kept else ""
        return f"{spelled(self.asked)}, because {self.why}{stead}"


def suggest(
    asked: Sequence[Pass], applied: Sequence[Pass], check: Check
) -> tuple[tuple[Pass, ...] | None, tuple[str, ...]]:
    """Find a list that would work on top of what is applied.

    A pass that is refused is given up before another one is turned away from its slot, so that
    the order in which they were asked for does not decide whether there is such a list.

    Args:
        asked: well-formed passes, in any order.
        applied: passes that the pipeline carries already.
        check: asks every pass of a list what stands in its way.

    Returns:
        The list, or None; and which passes it leaves out, and why.
    """
    candidates = [_Candidate(p, p) for p in asked]
    while True:
        left = [c for c in candidates if not c.out]
        unfit = dict(zip(left, misfits([c.pass_ for c in left], applied), strict=True))
        rest = {id(c.pass_): c for c, why in unfit.items() if why is None}
        steps = check(by_stage(c.pass_ for c in rest.values()))
        refused = next((n for n, step in enumerate(steps) if step.refused), None)
        if refused is None:
            break
        earlier = [rest[id(step.pass_)] for step in steps[:refused]]
        _mend(earlier, rest[id(steps[refused].pass_)], steps[refused].findings)
    if not steps:
        return None, ()
    for candidate, why in unfit.items():
        candidate.why = candidate.why or why or ""
    kept = set(rest.values())
    lost = [c.told(kept=c in kept) for c in candidates if c not in kept or c.pass_ is not c.asked]
    return tuple(step.pass_ for step in steps), tuple(lost)


def _mend(earlier: Sequence[_Candidate], refused: _Candidate, findings: Sequence[Finding]) -> None:
    """Do as findings advise: put another pass there, once, or leave one out."""
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in errors:
        other = finding.instead
        if other is not None and malformed(other) is None and refused.pass_ is refused.asked:
            refused.pass_, refused.why = other, finding.message
            return
        bringers = [c for c in earlier if finding.trait in provided_traits(c.pass_)]
        for candidate in bringers:
            candidate.out = True
            candidate.why = candidate.why or f"{refused.pass_.name} refuses it: {finding.message}"
        if bringers:
            return
    refused.out, refused.why = True, refused.why or errors[0].message
