"""The data of `tune`: families of lists, trials of them, and candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

from fluxfire.bench.intervals import Interval
from fluxfire.bench.quality import Quality
from fluxfire.protocol import Pass, configured

MIN_SPEEDUP = 1.02
"""Smallest speedup that makes a lossy list worth its risk."""
Part = Literal["search", "choose", "confirm"]
Verdict = Literal["within", "outside", "slower", "failed", "no better than fewer steps"]


@dataclass(frozen=True)
class Family:
    """Lists of passes that differ in the settings of one, or in the number of steps.

    Attributes:
        passes: the passes, in order.
        knob: settings of one of these passes, from careful to fast, which `using` can change at
            run time; empty if there is only one setting.
        steps: numbers of denoising steps, from many to few, in place of a knob.
    """

    passes: tuple[Pass, ...] = ()
    knob: tuple[Pass, ...] = ()
    steps: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of settings."""
        return len(self.knob or self.steps) or 1

    def at(self, index: int) -> tuple[Pass, ...]:
        """Return the list of passes at one setting."""
        if not self.knob:
            return self.passes
        turned = self.knob[index]
        return tuple(turned if p.name == turned.name else p for p in self.passes)

    def steps_at(self, index: int) -> int | None:
        """Return the number of steps at one setting; None for the workload's."""
        return self.steps[index] if self.steps else None


@dataclass(frozen=True)
class FewerStepsComparison:
    """A lossy list compared with plain at fewer steps, on the same examples and noise.

    Attributes:
        steps: plain's number of steps: as many as the list computed, rounded up.
        psnr: mean PSNR of plain with this number of steps, in dB.
        difference: the list's PSNR minus plain's, in dB; None for a single example.
    """

    steps: int
    psnr: float
    difference: Interval | None

    @property
    def beats_fewer_steps(self) -> bool:
        """Whether the list is certainly better: the whole interval lies above 0."""
        return self.difference is not None and self.difference.above_zero

    def __str__(self) -> str:
        if self.difference is None:
            return f"one example is too few to compare with num_inference_steps={self.steps}"
        gap = self.difference
        gap_text = f"this list has {gap.mean:+.1f} dB [{gap.low:+.1f}, {gap.high:+.1f}]"
        answers = {
            "better": f"it beats num_inference_steps={self.steps}: {gap_text}",
            "worse": f"num_inference_steps={self.steps} does better: {gap_text}",
            "no difference shown": f"num_inference_steps={self.steps} does the same, as far as "
            f"{gap.n} examples show: {gap_text}",
        }
        unsure = f"compared with num_inference_steps={self.steps}: {gap_text}; {gap.verdict}"
        return answers.get(gap.verdict, unsure)


@dataclass(frozen=True)
class Trial:
    """One list of passes on some of the examples.

    Attributes:
        passes: the list.
        part: the part of the examples.
        verdict: `"within"` the budget or a reason for rejection. A trial ends with the first
            picture outside the budget, or when it is slower than the best list so far.
        why: the exceeded limit, or the error; empty if all pictures are within the budget.
        quality: similarity to the plain pipeline's pictures, per example; None if it failed.
        seconds: median seconds of an edit; nan if it failed.
        speed: speedup over plain, the median over the same examples.
        plain_success: share of correct edits of the plain pipeline on the same examples; None if
            no program can check them, or if the trial failed.
        steps: number of denoising steps; None for the workload's.
        work: mean computed work of an edit, in full steps.
        comparison: a lossy list's comparison with plain at as many steps as it computed.
    """

    passes: tuple[Pass, ...]
    part: Part
    verdict: Verdict
    why: str
    quality: Quality | None
    seconds: float
    speed: float
    plain_success: float | None = None
    steps: int | None = None
    work: float = 0.0
    comparison: FewerStepsComparison | None = None

    @property
    def lossy(self) -> bool:
        """Whether its passes may change a picture by more than rounding."""
        return any(p.exactness == "lossy" for p in self.passes)

    @property
    def examples(self) -> int:
        """Number of edited examples."""
        return len(self.quality.similarities) if self.quality else 0

    @property
    def worth(self) -> float:
        """Its speed, with a bonus of 2% for an exact list and another 2% for plain."""
        exact = not self.lossy and self.steps is None
        plain = exact and not self.passes
        return self.speed * (MIN_SPEEDUP if exact else 1.0) * (MIN_SPEEDUP if plain else 1.0)


@dataclass(frozen=True)
class Candidate:
    """One setting of a family, with its trial.

    Attributes:
        family: the family.
        index: position of the setting.
        trial: the trial of this setting.
    """

    family: Family
    index: int
    trial: Trial

    @property
    def is_plain(self) -> bool:
        """Whether it is the plain pipeline with all steps."""
        return not self.family.passes and not self.family.steps


def describe_passes(passes: Sequence[Pass]) -> str:
    """Return a short description of a list: names, and settings that are not defaults."""
    return " + ".join(map(_describe_pass, passes)) or "plain"


def _describe_pass(pass_: Pass) -> str:
    if not is_dataclass(pass_):
        return pass_.name
    try:
        default: Any = type(pass_)()
    except TypeError:
        return repr(pass_)
    own = configured(pass_).settings
    changed = [f"{k}={v!r}" for k, v in own.items() if v != getattr(default, k)]
    return f"{pass_.name}({', '.join(changed)})" if changed else pass_.name
