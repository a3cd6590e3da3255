"""The report: what each pass did to a pipeline, and the cost of the pipeline's generations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fluxfire.protocol import Change, Exactness, Finding, Pass, Stage
from fluxfire.reporting.statistics import RunStatistics
from fluxfire.text import (
    count_of,
    html_lines,
    html_table,
    human_bytes,
    human_seconds,
    settings_line,
    spell_non_defaults,
    table,
)


@dataclass(frozen=True)
class PassReport:
    """The report of one applied pass.

    Attributes:
        name: the pass's name.
        configuration: the pass's repr; evaluating it creates an equal pass.
        stage: the pass's stage.
        exactness: what the pass does to the picture.
        change: what the pass changed.
        seconds: how long it took to apply the pass.
        findings: the warnings and infos of the pass's `check`.
        facts: by name, what the pass reports about its work so far.
        settings: the pass's repr without default settings; empty if all settings are defaults.
    """

    name: str
    configuration: str
    stage: Stage
    exactness: Exactness
    change: Change
    seconds: float
    findings: tuple[Finding, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    settings: str = ""

    @classmethod
    def of(
        cls, pass_: Pass, change: Change, seconds: float, findings: tuple[Finding, ...]
    ) -> PassReport:
        """Create the report of a pass right after its application."""
        return cls(
            name=pass_.name,
            configuration=repr(pass_),
            stage=pass_.stage,
            exactness=pass_.exactness,
            change=change,
            seconds=seconds,
            findings=findings,
            settings=spell_non_defaults(pass_),
        )

    def __str__(self) -> str:
        change = f"{self.change.count} {self.change.what}, {_memory(self.change)}"
        return f"{self.name}: {change}, in {human_seconds(self.seconds)}"


@dataclass(frozen=True, repr=False)
class Report:
    """Everything that fluxfire knows about a pipeline. Prints as tables.

    Attributes:
        passes: the applied passes, in order; empty for a plain pipeline.
        warmup_seconds: total duration of `warmup`; None if nobody called it.
        runs: statistics of the latest generations, the oldest first.
    """

    passes: tuple[PassReport, ...] = ()
    warmup_seconds: float | None = None
    runs: tuple[RunStatistics, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, fit for JSON."""
        return {
            "passes": [asdict(p) for p in self.passes],
            "warmup_seconds": self.warmup_seconds,
            "generations": [r.to_dict() for r in self.runs],
        }

    def __repr__(self) -> str:
        names = ", ".join(p.name for p in self.passes) or "no passes"
        return f"<Report: {names}; {count_of(len(self.runs), 'generation')}>"

    def __str__(self) -> str:
        if not self.passes and not self.runs:
            return _NOTHING
        parts = ["No passes applied."]
        if self.passes:
            parts = [table(_PASS_HEAD, map(_pass_row, self.passes))]
        parts += self._notes()
        if self.runs:
            parts += ["", table(_RUN_HEAD, map(_run_row, self.runs))]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        """Return the tables as HTML, which notebooks show."""
        if not self.passes and not self.runs:
            return html_lines([_NOTHING])
        parts = [html_table(_PASS_HEAD, map(_pass_row, self.passes)), html_lines(self._notes())]
        if self.runs:
            parts.append(html_table(_RUN_HEAD, map(_run_row, self.runs)))
        return "".join(parts)

    def _notes(self) -> list[str]:
        lines = settings_line(p.settings for p in self.passes)
        lines += [f"{p.name}: {f.level}: {f}" for p in self.passes for f in p.findings]
        lines += [f"{p.name}: {_fact_line(p.facts)}" for p in self.passes if p.facts]
        if self.warmup_seconds is not None:
            lines.append(f"warm-up: {human_seconds(self.warmup_seconds)}")
        return lines


_NOTHING = "No passes applied, nothing generated."
_PASS_HEAD = ("pass", "stage", "exactness", "changed", "memory", "applied in")
_RUN_HEAD = (
    "generation",
    "noise+reference+text tokens",
    "steps",
    "a step (median)",
    "in all",
    "hits",
    "compiles",
    "recompiles",
    "breaks",
    "tracing",
    "compiling",
    "error",
)


def _pass_row(report: PassReport) -> tuple[str, ...]:
    return (
        report.name,
        report.stage,
        report.exactness,
        f"{report.change.count} {report.change.what}",
        _memory(report.change),
        human_seconds(report.seconds),
    )


def _memory(change: Change) -> str:
    host = f", {human_bytes(change.host_bytes)} on the host" if change.host_bytes else ""
    return human_bytes(change.bytes) + host


def _fact_line(facts: Mapping[str, object]) -> str:
    return "; ".join(f"{name.replace('_', ' ')} {_value(name, v)}" for name, v in facts.items())


def _value(name: str, value: object) -> str:
    if isinstance(value, float) and name.endswith("seconds"):
        return human_seconds(value)
    if isinstance(value, int) and name.endswith("bytes"):
        return human_bytes(value).lstrip("+")
    return str(value)


def _run_row(run: RunStatistics) -> tuple[object, ...]:
    facts = run.to_dict()
    pace = facts["seconds_a_step"]
    return (
        run.number,
        "+".join(map(str, facts["tokens"].values())) if facts["tokens"] else "-",
        facts["steps"],
        human_seconds(pace) if pace is not None else "-",
        human_seconds(run.seconds),
        f"{run.hit_rate:.0%}" if run.hit_rate is not None else "-",
        run.compiles,
        run.recompiles,
        run.graph_breaks,
        _seconds_or_dash(run.compiled.trace_seconds),
        _seconds_or_dash(run.compiled.compile_seconds),
        run.error or "",
    )


def _seconds_or_dash(seconds: float) -> str:
    return human_seconds(seconds) if seconds else "-"
