"""The plan: what `optimize` would do, or why it would refuse."""

from __future__ import annotations

from dataclasses import dataclass

from fluxfire.errors import PlanError
from fluxfire.protocol import Finding, Pass
from fluxfire.text import (
    bullets,
    count_of,
    html_lines,
    html_table,
    settings_line,
    spell,
    spell_non_defaults,
    table,
)


@dataclass(frozen=True)
class Step:
    """One pass of a plan, with the findings of its `check`.

    Attributes:
        pass_: the pass.
        findings: what the check yielded; empty if it did not run.
        faults: the plan's problems that concern this pass.
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
        """All faults and findings in one line; `ready` if there are none."""
        faults = ["error: see below"] if self.faults else []
        return "; ".join([*faults, *(f"{f.level}: {f}" for f in self.findings)]) or "ready"


_HEAD = ("pass", "stage", "exactness", "verdict")


@dataclass(frozen=True, repr=False)
class Plan:
    """The plan: what `optimize` would do, or why it would refuse.

    Attributes:
        steps: the passes to apply, in order, with their findings.
        problems: messages about the pipeline, or about conflicts between the passes.
        applied: passes that the pipeline already carries.
        suggestion: if the plan is not ok, a list that works; None if there is none.
        left_out: one line for each requested pass that the suggestion lacks, with the reason.
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
        """All problems, and the errors that checks found, as messages."""
        refusals = [
            f"{s.pass_.name}: {f}" for s in self.steps for f in s.findings if f.level == "error"
        ]
        return [*self.problems, *refusals]

    def raise_if_bad(self) -> None:
        """Raise `PlanError` with all complaints, unless the plan is ok."""
        if self.ok:
            return
        lines = ["This list of passes cannot be applied. Nothing was changed."]
        lines += [bullets(self.complaints()), *self._suggestion_lines()]
        raise PlanError("\n".join(lines), suggestion=self.suggestion or ())

    def _suggestion_lines(self) -> list[str]:
        lines = []
        if self.suggestion:
            passes = ", ".join(map(spell, self.suggestion))
            lines = [f"A list that would work: [{passes}]"]
            lines += (f"  left out: {line}" for line in self.left_out)
        if self.applied and not self.ok:
            lines.append("To have this list in place of what is applied, restore(pipe) first.")
        return lines

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"refused ({'; '.join(self.complaints())})"
        return f"<Plan of {count_of(len(self.steps), 'step')}: {verdict}>"

    def __str__(self) -> str:
        rows = self._rows()
        return "\n".join([table(_HEAD, rows) if rows else "No passes.", *self._notes()])

    def _repr_html_(self) -> str:
        """Return the table and notes as HTML, which notebooks show."""
        return html_table(_HEAD, self._rows()) + html_lines(self._notes())

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        rows += [(p.name, p.stage, p.exactness, "already applied") for p in self.applied]
        rows += [(s.pass_.name, s.pass_.stage, s.pass_.exactness, s.verdict) for s in self.steps]
        return rows

    def _notes(self) -> list[str]:
        passes = [*self.applied, *(s.pass_ for s in self.steps)]
        errors = [f"error: {problem}" for problem in self.problems]
        settings = settings_line(map(spell_non_defaults, passes))
        return [*settings, *errors, *self._suggestion_lines()]
