"""The measurements of one contender on one workload."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

from PIL import Image

from fluxfire.bench.contenders import Contender
from fluxfire.bench.power import EnergyUse
from fluxfire.bench.quality import Quality
from fluxfire.bench.timing import Sample
from fluxfire.bench.work import Work
from fluxfire.bench.workload import Workload
from fluxfire.reporting.statistics import RunStatistics, StepKind


@dataclass(frozen=True)
class TimedEdit:
    """One timed edit.

    Attributes:
        seconds: from the call to the picture.
        steps: seconds and kind of each step.
        phases: seconds by phase.
        hit_rate: share of the cache's decisions that were hits; None without a cache.
        compiles: how many times torch.compile traced code; 0 is expected.
        graph_breaks: number of graph breaks.
        work: the computed work.
    """

    seconds: float
    steps: tuple[tuple[float, StepKind], ...]
    phases: dict[str, float]
    hit_rate: float | None
    compiles: int
    graph_breaks: int
    work: Work


@dataclass(eq=False)
class Row:
    """The measurements of one contender on one workload, over all rounds.

    Attributes:
        contender: the contender.
        workload: the workload.
        applied: seconds and memory of applying the passes in the first round.
        first: the first warm-up run of each round, which compiles.
        edits: the timed edits, in order.
        energy: energy use of each round, if the device reports it.
        pictures: the first round's pictures, by the example's position.
        right: for each example, whether its edit is correct; None if no program can check it.
        peak: peak of the allocated memory in an edit, in GiB.
        weights: bytes of the transformer's weights; 0 if unknown.
        quality: similarity to each reference's pictures, by the reference's name.
        twin: name of a lossy contender's twin: the same list without lossy passes.
        fewer_steps_name: name of the twin with as many steps as this row computed; None if it
            computed all steps.
        fewer_steps_row: the row of that twin.
        again: seconds of the first contender's edits in its repetition at the end.
        error: the contender's error; None without one.
    """

    contender: Contender
    workload: Workload
    applied: dict[str, float] = field(default_factory=dict)
    first: list[RunStatistics] = field(default_factory=list)
    edits: list[TimedEdit] = field(default_factory=list)
    energy: list[EnergyUse] = field(default_factory=list)
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    right: list[bool | None] = field(default_factory=list)
    peak: float = 0.0
    weights: int = 0
    quality: dict[str, Quality] = field(default_factory=dict)
    twin: str | None = None
    fewer_steps_name: str | None = None
    fewer_steps_row: Row | None = None
    again: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def has_content(self) -> bool:
        """Whether the row has edits or an error to report."""
        return bool(self.edits) or self.error is not None

    @property
    def steps(self) -> int:
        """Number of denoising steps of its edits."""
        return self.contender.steps or self.workload.steps

    @property
    def moved(self) -> float | None:
        """Relative change of the median edit from the first turn to the repetition at the end."""
        if not self.again:
            return None
        before = median(edit.seconds for edit in self.edits[: len(self.again)])
        return median(self.again) / before - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data; `src/fluxfire/bench/schema.json` describes it."""
        settings = self.contender.settings.get(self.workload.name)
        row: dict[str, Any] = {
            "contender": self.contender.name,
            "role": self.contender.role,
            "passes": [repr(p) for p in self.contender.passes],
            "settings": repr(settings) if settings else None,
            "scheduled": self.contender.scheduled,
            "lossy": self.contender.lossy,
            "may_skip": self.contender.may_skip,
            "steps": self.steps,
            "workload": asdict(self.workload),
            "error": self.error,
            **self.applied,
        }
        return {**row, **self._measured()} if self.edits else row

    def _measured(self) -> dict[str, Any]:
        names = dict.fromkeys(name for edit in self.edits for name in edit.phases)
        return {
            "first_seconds": [r.seconds for r in self.first],
            "first_compiles": self.first[0].compiles if self.first else None,
            "compiles": sum(e.compiles for e in self.edits),
            "graph_breaks": sum(r.graph_breaks for r in self.first)
            + sum(e.graph_breaks for e in self.edits),
            "edit": Sample.of(e.seconds for e in self.edits).to_dict(),
            "again": Sample.of(self.again).to_dict() if self.again else None,
            "moved": self.moved,
            "work": mean(e.work.steps for e in self.edits),
            "skipped": mean(e.work.skipped for e in self.edits),
            **self._steps(),
            "phases": {
                n: Sample.of(e.phases.get(n, 0.0) for e in self.edits).to_dict() for n in names
            },
            "peak_gib": self.peak,
            "joules": sum(d.joules for d in self.energy) / len(self.edits) if self.energy else None,
            "utilisation": self._utilisation(),
            "quality": {name: quality.to_dict() for name, quality in self.quality.items()},
            "twin": self.twin,
            "beside_fewer_steps": self._compare_with_fewer_steps(),
        }

    def _compare_with_fewer_steps(self) -> dict[str, Any] | None:
        """Return the comparison with fewer steps in dB; above 0 means that this row is better."""
        if self.fewer_steps_row is None or self.twin is None:
            return None
        mine, theirs = (row.quality.get(self.twin) for row in (self, self.fewer_steps_row))
        if mine is None or theirs is None:
            return None
        differences = {name: mine.minus(theirs, name) for name in ("psnr", "edited")}
        return {
            "contender": self.fewer_steps_name,
            "steps": self.fewer_steps_row.steps,
            **{name: asdict(one) if one else None for name, one in differences.items()},
        }

    def _steps(self) -> dict[str, Any]:
        """Return figures by kind of step; None for a baseline that does not report its hits."""
        baseline = self.contender.baseline
        if baseline is not None and baseline.skips:
            unknown = (
                "step",
                "hit_step",
                "hits",
                "reuse_step",
                "reuses",
                "weights_gb_per_second",
            )
            return dict.fromkeys(unknown)
        steps = [step for edit in self.edits for step in edit.steps]
        computed, reused, hits = (
            [seconds for seconds, kind in steps if kind == wanted]
            for wanted in ("computed", "reused", "hit")
        )
        step = Sample.of(computed) if computed else None
        return {
            "step": step.to_dict() if step else None,
            "hit_step": Sample.of(hits).to_dict() if hits else None,
            "hits": len(hits) / len(self.edits),
            "reuse_step": Sample.of(reused).to_dict() if reused else None,
            "reuses": len(reused) / len(self.edits),
            "weights_gb_per_second": self.weights / step.median / 1e9
            if step and self.weights
            else None,
        }

    def _utilisation(self) -> float | None:
        known = [(d.utilisation, d.seconds) for d in self.energy if d.utilisation is not None]
        seconds = sum(s for _, s in known)
        return sum(u * s for u, s in known) / seconds if seconds else None
