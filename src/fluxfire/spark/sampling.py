"""Edits drawn at random: whole batches of one kind, every picture orderly.

Some combinations of kind, shape and colour are held out of training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxfire.spark.edits import KINDS, Choice, Edit
from fluxfire.spark.scenes import COLOURS, Dice, Scenes, draw, join


def held_out(kind: int, shape: Tensor, colour: Tensor) -> Tensor:
    """Whether training never shows this kind of edit on this shape in this colour.

    For each kind and shape that is one colour of eight: the one it has after the edit.
    """
    return (3 * kind + 5 * shape + colour) % len(COLOURS) == 0


@dataclass(frozen=True)
class Batch:
    """Edits of one kind.

    Attributes:
        edit: the kind.
        source: N scenes.
        target: the same, edited.
        choice: what was drawn.
        novel: (N,) bool, whether the combination is held out of training.
    """

    edit: Edit
    source: Scenes
    target: Scenes
    choice: Choice
    novel: Tensor

    def take(self, index: Tensor | slice) -> Batch:
        """Pick some of the edits."""
        return replace(
            self,
            source=self.source.take(index),
            target=self.target.take(index),
            choice={name: t[index] for name, t in self.choice.items()},
            novel=self.novel[index],
        )

    def instruction(self, row: int, wording: str) -> str:
        """Word one edit."""
        return wording.format(**self.edit.fields(self.source, self.choice, row))


def draw_edits(
    edit: Edit, n: int, extent: tuple[float, float], dice: Dice, *, novel: bool | None = None
) -> Batch:
    """Draw n edits of one kind, each possible and with both pictures orderly.

    Args:
        edit: the kind.
        n: how many.
        extent: (width, height) of the pictures, the shorter 1.
        dice: what to draw with.
        novel: only combinations held out of training (True), only others (False), or any.
    """
    found: list[Batch] = []
    while sum(len(b.source) for b in found) < n:
        scenes = draw(8 * n, extent, dice)
        scenes = scenes.take(scenes.orderly())
        choice = edit.draw(scenes, dice)
        target = edit.apply(scenes, choice)
        fresh = _novel(edit, target, choice)
        wanted = target.orderly() & changed(scenes, target, edit)
        if novel is not None and "subject" in choice:
            wanted &= fresh == novel
        found.append(Batch(edit, scenes, target, choice, fresh).take(wanted))
    return join_edits(found).take(slice(n))


def join_edits(parts: list[Batch]) -> Batch:
    """Put batches of one kind together."""
    return Batch(
        parts[0].edit,
        join([b.source for b in parts]),
        join([b.target for b in parts]),
        {name: torch.cat([b.choice[name] for b in parts]) for name in parts[0].choice},
        torch.cat([b.novel for b in parts]),
    )


def _novel(edit: Edit, target: Scenes, choice: Choice) -> Tensor:
    if "subject" not in choice:
        return torch.zeros(len(target), dtype=torch.bool)
    kind = list(KINDS).index(edit.name)
    slots = [choice[role] for role in ("subject", "other") if role in choice]
    return torch.stack(
        [held_out(kind, target.of("shape", s), target.of("colour", s)) for s in slots]
    ).any(0)


_LEAST_MOVE, _LEAST_TONE = 0.2, 0.08


def changed(source: Scenes, target: Scenes, edit: Edit) -> Tensor:
    """Whether an edit changes enough to be seen."""
    if edit.name in {"move", "swap"}:
        return torch.hypot(source.x - target.x, source.y - target.y).amax(1) >= _LEAST_MOVE
    if edit.name == "ground":
        tones = (source.tones - target.tones).abs().flatten(1).mean(1)
        return (source.pattern != target.pattern) | (tones >= _LEAST_TONE)
    return torch.ones(len(source), dtype=torch.bool)
