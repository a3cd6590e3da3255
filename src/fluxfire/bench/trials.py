"""What `tune` searches among, and what it saw of each: families of lists, trials, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

from fluxfire.bench.intervals import Interval
from fluxfire.bench.quality import Quality
from fluxfire.protocol import Pass, configured

MARGIN = 1.02
"""A list that is faster by less than this is not worth its risk."""
Part = Literal["search", "choose", "confirm"]
Verdict = Literal["within", "outside", "slower", "failed", "no better than fewer steps"]


@dataclass(frozen=True)
class Family:
    """Lists of passes that differ in the settings of one, or in the number of steps.

    Attributes:
        passes: what is applied, in order.
        dial: settings of one of these passes, from careful to fast, which `using` can change
            at run time; none if there is nothing to turn.
        steps: numbers of denoising steps, from many to few, in place of a dial.
    """

    passes: tuple[Pass, ...] = ()
    dial: tuple[Pass, ...] = ()
    steps: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Count the settings."""
        return len(self.dial or self.steps) or 1

    def at(self, rung: int) -> tuple[Pass, ...]:
        """Return the list with the dial at one of its settings."""
        if not self.dial:
            return self.passes
        turned = self.dial[rung]
        return tuple(turned if p.name == turned.name else p for p in self.passes)

    def steps_at(self, rung: int) -> int | None:
        """Return the number of steps of a setting; None for the workload's."""
        return self.steps[rung] if self.steps else None


@dataclass(frozen=True)
class Beside:
    """A lossy list compared with plain at fewer steps, on the same examples and noise.

    Attributes:
        steps: of plain: as many as the list computed, rounded up.
        psnr: mean PSNR of plain with so many steps, in dB.
        difference: what the list has more, in dB; None for a single example.
    """

    steps: int
    psnr: float
    difference: Interval | None

    @property
    def beaten(self) -> bool:
        """Whether the list is clearly nearer to the plain pictures: its whole interval is."""
        return self.difference is not None and self.difference.above_zero

    def __str__(self) -> str:
        if self.difference is None:
            return f"one example does not tell it from num_inference_steps={self.steps}"
        gap = self.difference
        said = f"this list has {gap.mean:+.1f} dB [{gap.low:+.1f}, {gap.high:+.1f}]"
        answers = {
            "better": f"it beats num_inference_steps={self.steps}: {said}",
            "worse": f"num_inference_steps={self.steps} does better: {said}",
            "no difference shown": f"num_inference_steps={self.steps} does the same, as far as "
            f"{gap.n} examples show: {said}",
        }
        unsure = f"beside num_inference_steps={self.steps}: {said}; {gap.verdict}"
        return answers.get(gap.verdict, unsure)


@dataclass(frozen=True)
class Trial:
    """One list of passes on some of the examples.

    Attributes:
        passes: the list.
        part: which examples.
        verdict: whether all is within the budget. A trial ends with the first picture
            outside, or when it is slower than the best so far.
        why: what was outside, or what was raised; empty where all is well.
        quality: beside the plain pipeline's pictures, example by example; None if it failed.
        seconds: of an edit, the median; nan if it failed.
        speed: how many times as fast as plain, the median over the same examples.
        plain_success: share of right edits among the same examples without passes; None where
            no program can tell, or if it failed.
        steps: number of denoising steps, where it is not the workload's.
        work: computed work of an edit in full steps, the mean over the examples.
        beside: of a lossy list: plain with as many steps as it computed.
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
    beside: Beside | None = None

    @property
    def lossy(self) -> bool:
        """Whether its passes may change a picture by more than rounding."""
        return any(p.exactness == "lossy" for p in self.passes)

    @property
    def examples(self) -> int:
        """How many were edited."""
        return len(self.quality.likenesses) if self.quality else 0

    @property
    def worth(self) -> float:
        """Its speed; an exact list counts 2% more, and plain 2% more again."""
        exact = not self.lossy and self.steps is None
        plain = exact and not self.passes
        return self.speed * (MARGIN if exact else 1.0) * (MARGIN if plain else 1.0)


@dataclass(frozen=True)
class Candidate:
    """A family with its dial at a setting, and how that did.

    Attributes:
        family: the family.
        rung: position on its dial.
        trial: what was seen of it.
    """

    family: Family
    rung: int
    trial: Trial

    @property
    def is_plain(self) -> bool:
        """Whether it is the plain pipeline with all its steps."""
        return not self.family.passes and not self.family.steps


def names(passes: Sequence[Pass]) -> str:
    """Write a list in short: names, and of settings those that are not the defaults."""
    return " + ".join(map(_brief, passes)) or "plain"


def _brief(pass_: Pass) -> str:
    if not is_dataclass(pass_):
        return pass_.name
    try:
        usual: Any = type(pass_)()
    except TypeError:
        return repr(pass_)
    own = configured(pass_).settings
    changed = [f"{k}={v!r}" for k, v in own.items() if v != getattr(usual, k)]
    return f"{pass_.name}({', '.join(changed)})" if changed else pass_.name
