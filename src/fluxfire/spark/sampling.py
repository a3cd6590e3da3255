"""Draws random edits: whole batches of one kind, where every picture is orderly.

Some combinations of kind, shape and colour are held out of training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxfire.spark.edits import KINDS, Choice, EditKind
from fluxfire.spark.scenes import COLOURS, Dice, Scenes, draw, join


def is_held_out(kind: int, shape: Tensor, colour: Tensor) -> Tensor:
    """Whether this combination of kind, shape and colour is held out of training.

    For each kind and shape one of eight colours is held out; the colour after the edit counts.
    """
    return (3 * kind + 5 * shape + colour) % len(COLOURS) == 0


@dataclass(frozen=True)
class Batch:
    """Edits of one kind.

    Attributes:
        edit: the kind.
        source: N scenes.
        target: the edited scenes.
        choice: the random choices.
        novel: (N,) bool, whether the combination is held out of training.
    """

    edit: EditKind
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
        """Return one edit's instruction in a given wording."""
        return wording.format(**self.edit.fields(self.source, self.choice, row))


def draw_edits(
    edit: EditKind, n: int, extent: tuple[float, float], dice: Dice, *, novel: bool | None = None
) -> Batch:
    """Draw n edits of one kind, each possible and with both pictures orderly.

    Args:
        edit: the kind.
        n: number of edits.
        extent: (width, height) of the pictures; the shorter is 1.
        dice: source of random numbers.
        novel: True for combinations held out of training, False for the others, None for any.
    """
    found: list[Batch] = []
    while sum(len(b.source) for b in found) < n:
        scenes = draw(8 * n, extent, dice)
        scenes = scenes.take(scenes.orderly())
        choice = edit.draw(scenes, dice)
        target = edit.apply(scenes, choice)
        fresh = _novel(edit, target, choice)
        wanted = target.orderly() & changes_enough(scenes, target, edit)
        if novel is not None and "subject" in choice:
            wanted &= fresh == novel
        found.append(Batch(edit, scenes, target, choice, fresh).take(wanted))
    return join_edits(found).take(slice(n))


def join_edits(parts: list[Batch]) -> Batch:
    """Concatenate batches of one kind."""
    return Batch(
        parts[0].edit,
        join([b.source for b in parts]),
        join([b.target for b in parts]),
        {name: torch.cat([b.choice[name] for b in parts]) for name in parts[0].choice},
        torch.cat([b.novel for b in parts]),
    )


def _novel(edit: EditKind, target: Scenes, choice: Choice) -> Tensor:
    if "subject" not in choice:
        return torch.zeros(len(target), dtype=torch.bool)
    kind = list(KINDS).index(edit.name)
    slots = [choice[role] for role in ("subject", "other") if role in choice]
    return torch.stack(
        [is_held_out(kind, target.of("shape", s), target.of("colour", s)) for s in slots]
    ).any(0)


_LEAST_MOVE, _LEAST_TONE = 0.2, 0.08


def changes_enough(source: Scenes, target: Scenes, edit: EditKind) -> Tensor:
    """Whether an edit changes enough to be visible: (N,) bool."""
    if edit.name in {"move", "swap"}:
        return torch.hypot(source.x - target.x, source.y - target.y).amax(1) >= _LEAST_MOVE
    if edit.name == "ground":
        tones = (source.tones - target.tones).abs().flatten(1).mean(1)
        return (source.pattern != target.pattern) | (tones >= _LEAST_TONE)
    return torch.ones(len(source), dtype=torch.bool)
