"""A dry run: what `optimize` would do, or why it would not."""

from __future__ import annotations

from dataclasses import dataclass

from fluxfire.errors import PlanError
from fluxfire.protocol import Finding, Pass
from fluxfire.text import bullets, own_settings, settings_line, spelled, table


@dataclass(frozen=True)
class Step:
    """One pass of a plan, with what its `check` found.

    Attributes:
        pass_: the pass.
        findings: what its check said; nothing if it was not asked.
        faults: those of the plan's problems that concern it.
    """

    pass_: Pass
    findings: tuple[Finding, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the pass cannot be applied."""
        return any(f.level == "error" for f in self.findings)

    @property
    def verdict(self) -> str:
        """Everything that is to be said of it, in a line."""
        said = ["error: see below"] if self.faults else []
        return "; ".join([*said, *(f"{f.level}: {f}" for f in self.findings)]) or "ready"


@dataclass(frozen=True)
class Plan:
    """A dry run: what `optimize` would do, or why it would not.

    Attributes:
        steps: the passes to apply, in order, with their findings.
        problems: what is wrong with the pipeline or with the list as a list.
        applied: passes that the pipeline already carries.
        suggestion: if the plan is not ok, a list that would be; None where there is none.
        left_out: which of the passes asked for the suggestion lacks, and why, in words.
    """

    steps: tuple[Step, ...]
    problems: tuple[str, ...] = ()
    applied: tuple[Pass, ...] = ()
    suggestion: tuple[Pass, ...] | None = None
    left_out: tuple[str, ...] = ()

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
        lines += [bullets(self.complaints()), *self._suggested()]
        raise PlanError("\n".join(lines), suggestion=self.suggestion or ())

    def _suggested(self) -> list[str]:
        said = []
        if self.suggestion:
            listed = ", ".join(map(spelled, self.suggestion))
            said = [f"A list that would work: [{listed}]"]
            said += (f"  left out: {line}" for line in self.left_out)
        if self.applied and not self.ok:
            said.append("To have this list in place of what is applied, restore(pipe) first.")
        return said

    def __str__(self) -> str:
        rows = [(p.name, p.stage, p.exactness, "already applied") for p in self.applied]
        rows += [(s.pass_.name, s.pass_.stage, s.pass_.exactness, s.verdict) for s in self.steps]
        text = table(("pass", "stage", "exactness", "verdict"), rows) if rows else "No passes."
        passes = [*self.applied, *(s.pass_ for s in self.steps)]
        said = settings_line(map(own_settings, passes))
        said += [f"error: {p}" for p in self.problems]
        return "\n".join([text, *said, *self._suggested()])
