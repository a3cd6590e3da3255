"""Examples for a pipeline: a source, an instruction, one valid target of many, and a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fluxfire.spark import checking, language
from fluxfire.spark.captions import draw_captioned
from fluxfire.spark.edits import KINDS, SIDES, Split
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import SEVERAL, Batch, draw_edits, kinds_of
from fluxfire.spark.scenes import SLOTS, Dice, Scenes

SIZES = ((128, 128), (160, 96), (96, 160), (144, 112), (112, 144))
"""(width, height) of Spark's pictures; the first is the usual one."""
ALL_KINDS = (*KINDS, SEVERAL)
_MULTIPLE = 16


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawing:
    """A text-to-image example.

    Attributes:
        instruction: the prompt.
        target: one valid result of many.
        scenes: what the target shows, as a batch of one.
    """

    instruction: str
    target: Image.Image
    scenes: Scenes

    def check(self, image: Any) -> bool:
        """Whether a picture shows what the instruction says, sharply, and nothing else changed.

        Args:
            image: a picture for `fluxfire.spark.checking.as_tensor`, of the target's size.

        Raises:
            ValueError: the image is not an RGB picture of that size.
        """
        return self.verdict(image).passed

    def verdict(self, image: Any) -> checking.Verdict:
        """Like `check`, but return the faults and the measurements."""
        picture, target = checking.as_tensor(image), checking.as_tensor(self.target)
        if picture.shape != target.shape:
            (_, h, w), (_, high, wide) = picture.shape, target.shape
            raise ValueError(f"the picture is {w}x{h}, but this example's are {wide}x{high}")
        return checking.judge(picture, self._task(), self._source(), target)

    def _task(self) -> checking.Task:
        return checking.Task(None, self.scenes, (len(SIDES),) * SLOTS)

    def _source(self) -> torch.Tensor | None:
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class SparkExample(Drawing):
    """An edit. `check` returns whether it was made and nothing else changed.

    Attributes:
        kind: one of `ALL_KINDS`.
        source: the picture to edit.
        batch: its scenes and what it asks, as a batch of one.
    """

    kind: str
    source: Image.Image
    batch: Batch

    def _task(self) -> checking.Task:
        side = [len(SIDES)] * SLOTS
        for choice in self.batch.choices:
            if "side" in choice:
                side[int(choice["subject"])] = int(choice["side"])
        return checking.Task(self.batch.source, self.scenes, tuple(side))

    def _source(self) -> torch.Tensor | None:
        return checking.as_tensor(self.source)


def examples(
    *,
    split: Split = "test",
    n: int = 100,
    seed: int = 0,
    size: tuple[int, int] = SIZES[0],
    kinds: tuple[str, ...] = ALL_KINDS,
) -> list[SparkExample]:
    """Draw edits of alternating kinds. The same arguments give the same edits.

    Args:
        split: `"train"` draws edits as in training. `"test"` draws edits that are held out of
            training: a combination of a kind and a thing, or a wording, or both.
        n: number of edits.
        seed: another seed gives other edits.
        size: (width, height) in pixels, multiples of 16; the shorter side is best near 128.
        kinds: the kinds of edit.

    Raises:
        ValueError: an argument is out of range.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}; it must be train or test")
    if n < 1:
        raise ValueError(f"n={n}; it must be positive")
    if any(side < _MULTIPLE or side % _MULTIPLE for side in size):
        raise ValueError(f"size={size}; both sides must be positive multiples of {_MULTIPLE}")
    if unknown := [k for k in kinds if k not in ALL_KINDS]:
        raise ValueError(f"there are no kinds {unknown}; there are {', '.join(ALL_KINDS)}")
    each = -(-n // len(kinds))
    columns = [_of_kind(kind, each, split, seed, size) for kind in kinds]
    return [example for row in zip(*columns, strict=True) for example in row][:n]


def drawings(*, n: int = 100, seed: int = 0, size: tuple[int, int] = SIZES[0]) -> list[Drawing]:
    """Draw text-to-image examples; their seeds are not training's."""
    extent, shorter = _extent(size)
    scenes, captions = draw_captioned(n, extent, Dice("drawings", seed))
    rows = [scenes.take(slice(i, i + 1)) for i in range(n)]
    return [
        Drawing(instruction=caption, target=_picture(render(row, shorter)), scenes=row)
        for row, caption in zip(rows, captions, strict=True)
    ]


def _extent(size: tuple[int, int]) -> tuple[tuple[float, float], int]:
    shorter = min(size)
    return (size[0] / shorter, size[1] / shorter), shorter


def _of_kind(
    kind: str, n: int, split: Split, seed: int, size: tuple[int, int]
) -> list[SparkExample]:
    dice = Dice("examples", split, seed, kind)
    extent, shorter = _extent(size)
    rows: list[SparkExample] = []
    while len(rows) < n:
        # In the test split a third has a novel combination, a third a novel wording, a third both.
        third = int(dice.below(3, 1)) if split == "test" else None
        edits = kinds_of(kind, dice)
        batch = draw_edits(edits, 1, extent, dice, novel=third in (0, 2))
        known = split == "train" or (third == 0 and bool(batch.novel))
        words = [language.wordings(edit, "train" if known else "test") for edit in edits]
        chosen = tuple(some[int(dice.below(len(some), 1))] for some in words)
        source, target = (_picture(render(s, shorter)) for s in (batch.source, batch.target))
        instruction = language.phrase(batch.instruction(0, chosen), dice)
        rows.append(
            SparkExample(
                kind=kind,
                source=source,
                instruction=instruction,
                target=target,
                scenes=batch.target,
                batch=batch,
            )
        )
    return rows


def _picture(rendered: torch.Tensor) -> Image.Image:
    return Image.fromarray(rendered[0].mul(255).round().byte().movedim(0, -1).numpy())
