"""Examples for a pipeline: a source, an instruction, the exact target, and a check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from fluxfire.spark import checking, language
from fluxfire.spark.captions import draw_captioned
from fluxfire.spark.edits import KINDS, Split
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import Batch, draw_edits
from fluxfire.spark.scenes import Dice

SIZES = ((128, 128), (160, 96), (96, 160), (144, 112), (112, 144))
"""(width, height) of Spark's pictures; the first is the usual one."""
_MARGIN = 1.5  # an edit's visible change must exceed the tolerance by this factor


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawing:
    """A text-to-image example.

    Attributes:
        instruction: the prompt.
        target: the exact result.
    """

    instruction: str
    target: Image.Image

    def check(self, image: Any) -> bool:
        """Whether a picture shows exactly what the instruction says.

        Args:
            image: a picture for `fluxfire.spark.checking.as_tensor`, of the target's size.

        Raises:
            ValueError: the image is not an RGB picture of that size.
        """
        return self.verdict(image).passed

    def verdict(self, image: Any) -> checking.Verdict:
        """Like `check`, but return the measurements."""
        picture, target = checking.as_tensor(image), checking.as_tensor(self.target)
        if picture.shape != target.shape:
            (_, h, w), (_, high, wide) = picture.shape, target.shape
            raise ValueError(f"the picture is {w}x{h}, but this example's are {wide}x{high}")
        return checking.judge(picture, target)


@dataclass(frozen=True, eq=False, kw_only=True)
class SparkExample(Drawing):
    """An edit. `check` returns whether it was made and nothing else changed.

    Attributes:
        kind: a key of `fluxfire.spark.edits.KINDS`.
        source: the picture to edit.
        batch: its scenes, as a batch of one.
    """

    kind: str
    source: Image.Image
    batch: Batch


def examples(
    *,
    split: Split = "test",
    n: int = 100,
    seed: int = 0,
    size: tuple[int, int] = SIZES[0],
    kinds: tuple[str, ...] = tuple(KINDS),
) -> list[SparkExample]:
    """Draw edits of alternating kinds. The same arguments give the same edits.

    Args:
        split: `"train"` draws edits as in training. `"test"` draws edits that are held out of
            training: a combination of kind, shape and colour, or a wording, or both.
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
    if any(side < 16 or side % 16 for side in size):  # noqa: PLR2004
        raise ValueError(f"size={size}; both sides must be positive multiples of 16")
    if unknown := [k for k in kinds if k not in KINDS]:
        raise ValueError(f"there are no kinds {unknown}; there are {', '.join(KINDS)}")
    each = -(-n // len(kinds))
    columns = [_of_kind(kind, each, split, seed, size) for kind in kinds]
    return [example for row in zip(*columns, strict=True) for example in row][:n]


def drawings(*, n: int = 100, seed: int = 0, size: tuple[int, int] = SIZES[0]) -> list[Drawing]:
    """Draw text-to-image examples; their seeds are not training's."""
    shorter = min(size)
    extent = (size[0] / shorter, size[1] / shorter)
    scenes, captions = draw_captioned(n, extent, Dice("drawings", seed))
    return [
        Drawing(instruction=caption, target=_picture(render(scenes.take(slice(i, i + 1)), shorter)))
        for i, caption in enumerate(captions)
    ]


def _of_kind(
    kind: str, n: int, split: Split, seed: int, size: tuple[int, int]
) -> list[SparkExample]:
    edit, dice = KINDS[kind], Dice("examples", split, seed, kind)
    shorter = min(size)
    extent = (size[0] / shorter, size[1] / shorter)
    rows: list[SparkExample] = []
    while len(rows) < n:
        # In the test split a third has a novel combination, a third a novel wording, a third both.
        third = int(dice.below(3, 1)) if split == "test" else None
        batch = draw_edits(edit, 1, extent, dice, novel=third in (0, 2))
        known = split == "train" or (third == 0 and "subject" in batch.choice)
        wordings = language.wordings(edit, "train" if known else "test")
        wording = wordings[int(dice.below(len(wordings), 1))]
        source, target = (_picture(render(s, shorter)) for s in (batch.source, batch.target))
        unedited = checking.judge(checking.as_tensor(source), checking.as_tensor(target))
        if replace(unedited, blemish=unedited.blemish / _MARGIN).passed:
            continue  # hardly visible: under other shapes, or in the ground's colour
        instruction = language.phrase(batch.instruction(0, wording), dice)
        rows.append(
            SparkExample(
                kind=kind, source=source, instruction=instruction, target=target, batch=batch
            )
        )
    return rows


def _picture(rendered: torch.Tensor) -> Image.Image:
    return Image.fromarray(rendered[0].mul(255).round().byte().movedim(0, -1).numpy())
