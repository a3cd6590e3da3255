"""What the harness found of one contender on one workload."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

from PIL import Image

from fluxfire.bench.contenders import Contender
from fluxfire.bench.power import Drawn
from fluxfire.bench.quality import Quality
from fluxfire.bench.timing import Sample
from fluxfire.bench.work import Work
from fluxfire.bench.workload import Workload
from fluxfire.reporting.statistics import RunStatistics, StepKind


@dataclass(frozen=True)
class Edit:
    """One edit that counts.

    Attributes:
        seconds: from the call to the picture.
        steps: seconds of each step, and what caches left out of it.
        phases: seconds by phase.
        hit_rate: share of the cache's decisions that were hits; None without one.
        compiles: how often torch.compile traced code; none are expected.
        graph_breaks: places where a graph was cut in two.
        work: how much was computed, in full steps.
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
    """One contender on one workload, over the rounds.

    Attributes:
        contender: the contender.
        workload: the workload.
        applied: seconds and memory of applying the passes, the first time.
        first: the first short run of each round, which compiles.
        edits: in the order made.
        drawn: energy of each round's edits, where the device reports it.
        pictures: the first round's, by the example's position.
        right: for each example, whether its edit is right, where a program can tell.
        peak: GiB at most allocated in an edit.
        weights: bytes of the transformer's weights; 0 where nobody can be sure.
        quality: by the name of the control: how near the pictures are to its pictures.
        twin: of a lossy contender, the name of the same list without what is lossy.
        fewer: of a lossy contender, the name of its twin with as many steps as it computed; None
            if it computed them all.
        beside: the row of that contender.
        again: of the first contender, seconds of its edits at the very end.
        error: what it raised, if it did.
    """

    contender: Contender
    workload: Workload
    applied: dict[str, float] = field(default_factory=dict)
    first: list[RunStatistics] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    right: list[bool | None] = field(default_factory=list)
    peak: float = 0.0
    weights: int = 0
    quality: dict[str, Quality] = field(default_factory=dict)
    twin: str | None = None
    fewer: str | None = None
    beside: Row | None = None
    again: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def begun(self) -> bool:
        """Whether there is anything to report."""
        return bool(self.edits) or self.error is not None

    @property
    def steps(self) -> int:
        """Number of denoising steps of its edits."""
        return self.contender.steps or self.workload.steps

    @property
    def moved(self) -> float | None:
        """By how much of itself the median edit moved from the first turn to the very last."""
        if not self.again:
            return None
        before = median(edit.seconds for edit in self.edits[: len(self.again)])
        return median(self.again) / before - 1

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data; `src/fluxfire/bench/schema.json` describes it."""
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
            "joules": sum(d.joules for d in self.drawn) / len(self.edits) if self.drawn else None,
            "utilisation": self._utilisation(),
            "quality": {name: quality.to_dict() for name, quality in self.quality.items()},
            "twin": self.twin,
            "beside_fewer_steps": self._beside(),
        }

    def _beside(self) -> dict[str, Any] | None:
        """Compare with plain at fewer steps, in dB: above 0 where this row is nearer."""
        if self.beside is None or self.twin is None:
            return None
        mine, theirs = (row.quality.get(self.twin) for row in (self, self.beside))
        if mine is None or theirs is None:
            return None
        differences = {name: mine.minus(theirs, name) for name in ("psnr", "edited")}
        return {
            "contender": self.fewer,
            "steps": self.beside.steps,
            **{name: asdict(one) if one else None for name, one in differences.items()},
        }

    def _steps(self) -> dict[str, Any]:
        """Steps by kind; nothing of a library whose hits only the block counter sees."""
        baseline = self.contender.baseline
        if baseline is not None and baseline.skips:
            unknown = (
                "step", "hit_step", "hits", "reuse_step", "reuses", "weights_gb_per_second",
            )  # fmt: skip
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
        known = [(d.utilisation, d.seconds) for d in self.drawn if d.utilisation is not None]
        seconds = sum(s for _, s in known)
        return sum(u * s for u, s in known) / seconds if seconds else None
