"""What was done to a pipeline, and what its generations cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fluxfire.protocol import Change, Exactness, Finding, Pass, Stage
from fluxfire.reporting.statistics import RunStatistics
from fluxfire.text import human_bytes, human_seconds, own_settings, settings_line, table


@dataclass(frozen=True)
class PassReport:
    """One applied pass.

    Attributes:
        name: its name.
        configuration: its repr, which rebuilds it.
        stage: its stage.
        exactness: what it does to the picture.
        change: what it changed.
        seconds: how long applying it took.
        findings: what its `check` remarked.
        facts: what it tells of its work so far, by name.
        settings: its repr without the settings that are the defaults; empty if all are.
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
        """Make the report of a pass that was just applied."""
        return cls(
            pass_.name, repr(pass_), pass_.stage, pass_.exactness, change, seconds, findings,
            settings=own_settings(pass_),
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Everything known about an optimized pipeline. Prints as tables.

    Attributes:
        passes: the applied passes, in order; empty for a plain pipeline.
        warmup_seconds: what `warmup` took, or None if it was not called.
        runs: statistics of the latest generations, oldest first.
    """

    passes: tuple[PassReport, ...] = ()
    warmup_seconds: float | None = None
    runs: tuple[RunStatistics, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, fit for JSON."""
        return {
            "passes": [asdict(p) for p in self.passes],
            "warmup_seconds": self.warmup_seconds,
            "generations": [r.to_dict() for r in self.runs],
        }

    def __str__(self) -> str:
        if not self.passes and not self.runs:
            return "No passes applied, nothing generated."
        rows = [
            (
                p.name,
                p.stage,
                p.exactness,
                f"{p.change.count} {p.change.what}",
                _memory(p.change),
                human_seconds(p.seconds),
            )
            for p in self.passes
        ]
        parts = ["No passes applied."]
        if rows:
            parts = [table(("pass", "stage", "exactness", "changed", "memory", "applied in"), rows)]
        parts += settings_line(p.settings for p in self.passes)
        parts += [f"{p.name}: {f.level}: {f}" for p in self.passes for f in p.findings]
        parts += [f"{p.name}: {_told(p.facts)}" for p in self.passes if p.facts]
        if self.warmup_seconds is not None:
            parts.append(f"warm-up: {human_seconds(self.warmup_seconds)}")
        if self.runs:
            parts += ["", _runs(self.runs)]
        return "\n".join(parts)


def _memory(change: Change) -> str:
    host = f", {human_bytes(change.host_bytes)} on the host" if change.host_bytes else ""
    return human_bytes(change.bytes) + host


def _told(facts: Mapping[str, object]) -> str:
    return "; ".join(f"{name.replace('_', ' ')} {_value(name, v)}" for name, v in facts.items())


def _value(name: str, value: object) -> str:
    if isinstance(value, float) and name.endswith("seconds"):
        return human_seconds(value)
    if isinstance(value, int) and name.endswith("bytes"):
        return human_bytes(value).lstrip("+")
    return str(value)


def _runs(runs: tuple[RunStatistics, ...]) -> str:
    rows = []
    for run in runs:
        facts = run.to_dict()
        pace = facts["seconds_a_step"]
        rows.append(
            (
                run.number,
                "+".join(map(str, facts["tokens"].values())) if facts["tokens"] else "-",
                facts["steps"],
                human_seconds(pace) if pace is not None else "-",
                human_seconds(run.seconds),
                f"{run.hit_rate:.0%}" if run.hit_rate is not None else "-",
                run.compiles,
                run.recompiles,
                run.graph_breaks,
                _spent(run.compiled.trace_seconds),
                _spent(run.compiled.compile_seconds),
                run.error or "",
            )
        )
    head = (
        "generation", "noise+reference+text tokens", "steps", "a step (median)", "in all",
        "hits", "compiles", "recompiles", "breaks", "tracing", "compiling", "error",
    )  # fmt: skip
    return table(head, rows)


def _spent(seconds: float) -> str:
    return human_seconds(seconds) if seconds else "-"
