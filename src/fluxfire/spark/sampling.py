"""Draws random edits, several instructions in one too, where every picture is orderly.

Some combinations of a kind of edit and a thing, or of a thing and a ground, are held out of
training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxfire.spark.edits import KINDS, LOCAL, WHOLE, Choice, EditKind, is_at
from fluxfire.spark.scenes import LOOKS, Dice, Scenes, draw, join

_ONE_IN = 10
SEVERAL = "several"
"""The kind of examples with two instructions in one."""


def is_held_out(kind: int, thing: Tensor) -> Tensor:
    """Whether a kind of edit, or a ground, is never combined with a thing in training: bool."""
    return (3 * kind + thing) % _ONE_IN == 0


@dataclass(frozen=True)
class Batch:
    """Edits of one kind or of one pair of kinds.

    Attributes:
        edits: the kinds, in the instruction's order.
        source: N scenes.
        between: the scenes before each edit; the first is the source.
        target: the edited scenes, one valid result each.
        choices: what each edit asks.
        novel: (N,) bool, whether a combination is held out of training.
    """

    edits: tuple[EditKind, ...]
    source: Scenes
    between: tuple[Scenes, ...]
    target: Scenes
    choices: tuple[Choice, ...]
    novel: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor | slice) -> Batch:
        """Pick some of the edits."""
        return replace(
            self,
            source=self.source.take(index),
            between=tuple(scenes.take(index) for scenes in self.between),
            target=self.target.take(index),
            choices=tuple({name: t[index] for name, t in c.items()} for c in self.choices),
            novel=self.novel[index],
        )

    def instruction(self, row: int, wordings: tuple[str, ...]) -> str:
        """Return one edit's instruction in given wordings, one for each kind."""
        parts = [
            " ".join(wording.format(**edit.fields(scenes, choice, row)).split())
            for edit, scenes, choice, wording in zip(
                self.edits, self.between, self.choices, wordings, strict=True
            )
        ]
        return " and ".join(parts)


def kinds_of(name: str, dice: Dice) -> tuple[EditKind, ...]:
    """Return the edits that an example of a kind asks for; draw two for `SEVERAL`."""
    if name != SEVERAL:
        return (KINDS[name],)
    pair = [LOCAL[int(dice.below(len(LOCAL), 1))], WHOLE[int(dice.below(len(WHOLE), 1))]]
    if int(dice.below(2, 1)):
        pair.reverse()
    return tuple(KINDS[one] for one in pair)


def draw_edits(
    edits: tuple[EditKind, ...],
    n: int,
    extent: tuple[float, float],
    dice: Dice,
    *,
    novel: bool | None = None,
) -> Batch:
    """Draw n edits, each possible and with both pictures orderly.

    Args:
        edits: the kinds, applied one after the other.
        n: number of edits.
        extent: (width, height) of the pictures; the shorter is 1.
        dice: source of random numbers.
        novel: True for combinations held out of training, False for the others, None for any.
    """
    found: list[Batch] = []
    while sum(len(b) for b in found) < n:
        scenes = draw(8 * n + 8, extent, dice)
        scenes = scenes.take(scenes.orderly())
        between, choices, now = [], [], scenes
        wanted = torch.ones(len(scenes), dtype=torch.bool)
        for edit in edits:
            choice = edit.draw(now, dice)
            after = edit.apply(now, choice, dice)
            wanted &= _possible(edit, now, after, choice)
            between.append(now)
            choices.append(choice)
            now = after
        asked = list(zip(edits, choices, strict=True))
        fresh = torch.zeros(len(scenes), dtype=torch.bool)
        for edit, choice in asked:
            fresh |= _novel(edit, now, choice)
            if edit.name == "recolour":  # in black and white, nobody could see the colour
                wanted &= now.look != _GREY
        wanted &= now.orderly()
        if novel is not None and any(_can_be_novel(edit) for edit in edits):
            wanted &= fresh == novel
        whole = Batch(edits, scenes, tuple(between), now, tuple(choices), fresh)
        found.append(whole.take(wanted))
    return join_edits(found).take(slice(n))


def join_edits(parts: list[Batch]) -> Batch:
    """Concatenate batches of the same kinds."""
    first = parts[0]
    return Batch(
        first.edits,
        join([b.source for b in parts]),
        tuple(join([b.between[i] for b in parts]) for i in range(len(first.edits))),
        join([b.target for b in parts]),
        tuple(
            {name: torch.cat([b.choices[i][name] for b in parts]) for name in first.choices[i]}
            for i in range(len(first.edits))
        ),
        torch.cat([b.novel for b in parts]),
    )


_LEAST_MOVE = 0.25
_GREY = LOOKS.index("grey")


def _possible(edit: EditKind, before: Scenes, after: Scenes, choice: Choice) -> Tensor:
    """Whether an edit is visible, and fits what its instruction says: (N,) bool."""
    possible = torch.ones(len(before), dtype=torch.bool)
    if edit.name == "move":
        subject = choice["subject"]
        far = torch.hypot(
            before.of("x", subject) - after.of("x", subject),
            before.of("y", subject) - after.of("y", subject),
        )
        possible &= far >= _LEAST_MOVE
        at = before.of("x", subject), before.of("y", subject)
        possible &= ~is_at(choice["side"], *at, before.extent)
    if edit.name == "look":
        possible &= before.look == 0
    return possible


def _can_be_novel(edit: EditKind) -> bool:
    return edit.name != "look"


def _novel(edit: EditKind, result: Scenes, choice: Choice) -> Tensor:
    """Whether an edit's result has a combination that is held out of training: (N,) bool."""
    if edit.name == "ground":
        held_out = is_held_out(0, result.thing + 7 * choice["ground"][:, None])
        return (held_out & result.present).any(1)
    if not _can_be_novel(edit):
        return torch.zeros(len(result), dtype=torch.bool)
    thing = result.of("thing", choice["subject"])
    return is_held_out(1 + list(KINDS).index(edit.name), thing)
