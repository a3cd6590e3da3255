"""Scores a pipeline: edits examples, checks each by program, and summarises by kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.spark.checking import Verdict
from fluxfire.spark.tasks import Drawing, SparkExample
from fluxfire.text import table


@dataclass(frozen=True)
class Score:
    """One edited example.

    Attributes:
        kind: the example's kind.
        instruction: the prompt.
        verdict: what the check found.
        image: the result.
    """

    kind: str
    instruction: str
    verdict: Verdict
    image: Image.Image

    @property
    def passed(self) -> bool:
        """Whether the edit was made, sharply, and nothing else changed."""
        return self.verdict.passed


def psnr(image: torch.Tensor, target: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in [0, 1]; at most 100."""
    error = (image.double() - target.double()).square().mean().clamp_min(1e-10)
    return float(-10 * error.log10())


def score(
    pipe: DiffusersPipeline,
    examples: Sequence[Drawing],
    *,
    steps: int = 28,
    seed: int = 0,
    batch: int = 1,
    **call: Any,
) -> list[Score]:
    """Edit every example and check it.

    Args:
        pipe: a Kontext pipeline of Spark's size.
        examples: edits or text-to-image examples, not both; all of one size.
        steps: number of denoising steps.
        seed: seed of the first example's noise; each example has its own.
        batch: batch size.
        call: additional arguments of the pipeline's call.

    Raises:
        ValueError: the examples have several sizes.
    """
    sizes = {e.target.size for e in examples}
    if len(sizes) > 1:
        raise ValueError(f"the examples have several sizes, {sorted(sizes)}; score each apart")
    for width, height in sizes:
        call = {"width": width, "height": height, "_auto_resize": False, **call}
    scores = []
    for first in range(0, len(examples), batch):
        some = examples[first : first + batch]
        sources = [e.source for e in some if isinstance(e, SparkExample)]
        images = pipe(
            image=sources or None,
            prompt=[e.instruction for e in some],
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(some))],
            **call,
        ).images
        scores += [_score(e, image) for e, image in zip(some, images, strict=True)]
    return scores


def _score(example: Drawing, image: Image.Image) -> Score:
    kind = example.kind if isinstance(example, SparkExample) else "from words"
    return Score(kind, example.instruction, example.verdict(image), image)


@dataclass(frozen=True)
class Summary:
    """The share of right edits.

    Attributes:
        kind: the kind of edit, or `"all"`.
        n: number of examples.
        success: share of examples that passed.
    """

    kind: str
    n: int
    success: float


def summarise(scores: Sequence[Score]) -> list[Summary]:
    """Summarise by kind; the last row has all examples."""
    return list(_summaries(scores))


def _summaries(scores: Sequence[Score]) -> Iterator[Summary]:
    for kind in (*dict.fromkeys(s.kind for s in scores), "all"):
        some = [s.passed for s in scores if kind in ("all", s.kind)]
        yield Summary(kind, len(some), sum(some) / len(some))


def as_table(summaries: Sequence[Summary]) -> str:
    """Format summaries as a table."""
    rows = [(s.kind, str(s.n), f"{s.success:.1%}") for s in summaries]
    return table(("kind", "edits", "success"), rows)
