"""The kinds of edit that Spark knows: what each changes, and its wordings.

Each kind edits a whole batch of scenes; its `apply` gives the exact target. Some wordings are held
out of training, but training has seen all of their words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fluxfire.spark.scenes import (
    CANONICAL_SIZE,
    COLOURS,
    GROUNDS,
    PALETTE,
    SHAPES,
    SLOTS,
    STEP,
    STYLES,
    Dice,
    Scenes,
)

Split = Literal["train", "test"]
Choice = Mapping[str, Tensor]
"""The random choices for each scene: (N,) int64 tensors by name."""
FREE = SLOTS - 1
"""The slot that no drawn scene fills."""


class EditKind(Protocol):
    """One kind of edit."""

    name: ClassVar[str]

    @property
    def known(self) -> tuple[str, ...]:
        """Wordings of the training split."""

    @property
    def novel(self) -> tuple[str, ...]:
        """Wordings that are held out of training; training shows all of their words."""

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose randomly what to change in each scene."""

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Return the edited scenes."""

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Return the values of a wording's placeholders in one row."""


PLACES = {
    "in the top left corner": (0.0, 0.0),
    "at the top": (0.5, 0.0),
    "in the top right corner": (1.0, 0.0),
    "on the left side": (0.0, 0.5),
    "in the centre": (0.5, 0.5),
    "on the right side": (1.0, 0.5),
    "in the bottom left corner": (0.0, 1.0),
    "at the bottom": (0.5, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
_TO_PLACES = [f"to {place.split(' ', 1)[1]}" for place in PLACES]
_MARGIN = 4 * STEP
WAYS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_STRIDE = 4 * STEP
_GROWTH = 1.5


def place(index: Tensor, extent: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return the centres (x, y) of named places."""
    fractions = torch.tensor(list(PLACES.values()))[index]
    x, y = (_MARGIN + fractions[:, i] * (extent[i] - 2 * _MARGIN) for i in (0, 1))
    return x, y


def noun(scenes: Scenes, row: int, slot: int) -> str:
    """Return a shape's full name, such as "red circle"."""
    colour, shape = int(scenes.colour[row, slot]), int(scenes.shape[row, slot])
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}"


def _it(scenes: Scenes, choice: Choice, row: int, which: str = "subject") -> str:
    """Name a shape of the scene; sometimes only by its kind or colour, if that is unique."""
    slot = int(choice[which][row])
    here = scenes.present[row]
    form = int(choice["form"][row])
    same_shape = scenes.shape[row][here] == scenes.shape[row, slot]
    same_colour = scenes.colour[row][here] == scenes.colour[row, slot]
    colour, shape = noun(scenes, row, slot).split()
    if form == 0 and int(same_shape.sum()) == 1:
        return shape
    if form == 1 and int(same_colour.sum()) == 1:
        return f"{colour} shape"
    return f"{colour} {shape}"


def _subject(scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
    return {"subject": dice.which(scenes.present), "form": dice.below(6, len(scenes))}


@dataclass(frozen=True)
class Recolour:
    """Gives a shape one of the named colours."""

    name: ClassVar[str] = "recolour"
    known: tuple[str, ...] = (
        "make the {it} {colour}",
        "paint the {it} {colour}",
        "turn the {it} {colour}",
        "change the colour of the {it} to {colour}",
        "recolour the {it} in {colour}",
        "the {it} should be {colour}",
        "give the {it} a {colour} colour",
        "the colour of the {it} should be {colour}",
    )
    novel: tuple[str, ...] = (
        "change the {it} to {colour}",
        "make the colour of the {it} {colour}",
        "paint the {it} in {colour}",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a shape and a new colour."""
        chosen = _subject(scenes, dice)
        other = dice.below(len(COLOURS) - 1, len(scenes)) + 1
        chosen["colour"] = (scenes.of("colour", chosen["subject"]) + other) % len(COLOURS)
        return chosen

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Set name and tint."""
        colour = choice["colour"]
        return scenes.put(choice["subject"], colour=colour, tint=PALETTE[colour])

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name shape and colour."""
        colour = list(COLOURS)[int(choice["colour"][row])]
        return {"it": _it(scenes, choice, row), "colour": colour}


@dataclass(frozen=True)
class Remove:
    """Removes a shape."""

    name: ClassVar[str] = "remove"
    known: tuple[str, ...] = (
        "remove the {it}",
        "delete the {it}",
        "take the {it} away",
        "erase the {it}",
        "get rid of the {it}",
        "take out the {it}",
        "make the {it} disappear",
        "the {it} should be gone",
    )
    novel: tuple[str, ...] = (
        "take the {it} out",
        "the {it} should disappear",
        "take away the {it}",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a shape."""
        return _subject(scenes, dice)

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Unset its presence."""
        return scenes.put(choice["subject"], present=False)

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name the shape."""
        return {"it": _it(scenes, choice, row)}


@dataclass(frozen=True)
class Add:
    """Adds a shape at a named place, upright and of the canonical size."""

    name: ClassVar[str] = "add"
    known: tuple[str, ...] = (
        "add {new} {place}",
        "put {new} {place}",
        "place {new} {place}",
        "draw {new} {place}",
        "there should be {new} {place}",
        "insert {new} {place}",
        "{place} add {new}",
    )
    novel: tuple[str, ...] = (
        "{place} put {new}",
        "{place} there should be {new}",
        "{place} draw {new}",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a place; the free slot's shape and colour were drawn with the scene."""
        free = torch.full((len(scenes),), FREE)
        return {"subject": free, "place": dice.below(len(PLACES), len(scenes))}

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Fill the free slot."""
        x, y = place(choice["place"], scenes.extent)
        colour = scenes.of("colour", choice["subject"])
        return scenes.put(
            choice["subject"],
            x=x,
            y=y,
            size=CANONICAL_SIZE,
            angle=0.0,
            tint=PALETTE[colour],
            present=True,
        )

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name what and where."""
        what = noun(scenes, row, FREE)
        article = "an" if what[0] in "aeiou" else "a"
        return {"new": f"{article} {what}", "place": list(PLACES)[int(choice["place"][row])]}


@dataclass(frozen=True)
class Move:
    """Moves a shape to a named place."""

    name: ClassVar[str] = "move"
    known: tuple[str, ...] = (
        "move the {it} {to}",
        "shift the {it} {to}",
        "bring the {it} {to}",
        "put the {it} {place}",
        "the {it} should be {place}",
        "place the {it} {place}",
    )
    novel: tuple[str, ...] = ("the {it} should move {to}", "{place} put the {it}")

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a shape and a place."""
        return {**_subject(scenes, dice), "place": dice.below(len(PLACES), len(scenes))}

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Set the centre."""
        x, y = place(choice["place"], scenes.extent)
        return scenes.put(choice["subject"], x=x, y=y)

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name what and where."""
        index = int(choice["place"][row])
        return {
            "it": _it(scenes, choice, row),
            "to": _TO_PLACES[index],
            "place": list(PLACES)[index],
        }


@dataclass(frozen=True)
class Nudge:
    """Moves a shape by a fixed stride."""

    name: ClassVar[str] = "nudge"
    known: tuple[str, ...] = (
        "move the {it} a little {way}",
        "shift the {it} a little {way}",
        "bring the {it} a little {way}",
        "the {it} should be a little more {way}",
        "push the {it} a little {way}",
    )
    novel: tuple[str, ...] = ("a little {way} with the {it}", "the {it} should move a little {way}")

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a shape and a way."""
        return {**_subject(scenes, dice), "way": dice.below(len(WAYS), len(scenes))}

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Shift the centre."""
        step = _STRIDE * torch.tensor(list(WAYS.values()))[choice["way"]]
        subject = choice["subject"]
        x, y = scenes.of("x", subject) + step[:, 0], scenes.of("y", subject) + step[:, 1]
        return scenes.put(subject, x=x, y=y)

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name what and which way."""
        return {"it": _it(scenes, choice, row), "way": list(WAYS)[int(choice["way"][row])]}


@dataclass(frozen=True)
class Grow:
    """Makes a shape 1.5 times as big."""

    name: ClassVar[str] = "grow"
    known: tuple[str, ...] = (
        "make the {it} bigger",
        "enlarge the {it}",
        "make the {it} larger",
        "grow the {it}",
        "the {it} should be bigger",
    )
    novel: tuple[str, ...] = ("the {it} should be larger", "make the {it} grow")
    factor: float = _GROWTH

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a shape."""
        return _subject(scenes, dice)

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Scale it."""
        return scenes.put(
            choice["subject"], size=scenes.of("size", choice["subject"]) * self.factor
        )

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name the shape."""
        return {"it": _it(scenes, choice, row)}


@dataclass(frozen=True)
class Shrink(Grow):
    """Shrinks a shape by the factor of `Grow`."""

    name: ClassVar[str] = "shrink"
    known: tuple[str, ...] = (
        "make the {it} smaller",
        "shrink the {it}",
        "reduce the {it}",
        "the {it} should be smaller",
        "reduce the size of the {it}",
    )
    novel: tuple[str, ...] = ("make the {it} shrink", "the {it} should shrink")
    factor: float = 1 / _GROWTH


@dataclass(frozen=True)
class Swap:
    """Swaps the places of two shapes."""

    name: ClassVar[str] = "swap"
    known: tuple[str, ...] = (
        "swap the {it} and the {other}",
        "exchange the {it} and the {other}",
        "switch the {it} with the {other}",
        "swap the places of the {it} and the {other}",
        "let the {it} and the {other} trade places",
        "exchange the {it} with the {other}",
    )
    novel: tuple[str, ...] = (
        "swap the {it} with the {other}",
        "the {it} and the {other} should trade places",
        "switch the {it} and the {other}",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose two shapes."""
        chosen = _subject(scenes, dice)
        others = scenes.present.clone()
        others[torch.arange(len(scenes)), chosen["subject"]] = False
        return {**chosen, "other": dice.which(others)}

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Exchange the centres."""
        one, two = choice["subject"], choice["other"]
        swapped = scenes.put(one, x=scenes.of("x", two), y=scenes.of("y", two))
        return swapped.put(two, x=scenes.of("x", one), y=scenes.of("y", one))

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name both."""
        other = _it(scenes, choice, row, "other")
        return {"it": _it(scenes, choice, row), "other": other}


@dataclass(frozen=True)
class ChangeGround:
    """Puts the shapes on another, named ground."""

    name: ClassVar[str] = "ground"
    known: tuple[str, ...] = (
        "make the background {ground}",
        "change the background to {ground}",
        "put it on a {ground} background",
        "replace the background with a {ground} background",
        "use a {ground} background",
        "turn the background {ground}",
        "the background should be {ground}",
    )
    novel: tuple[str, ...] = (
        "give it a {ground} background",
        "paint the background {ground}",
        "there should be a {ground} background",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a ground."""
        return {"ground": dice.below(len(GROUNDS), len(scenes))}

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:
        """Set the ground."""
        return scenes.on(choice["ground"])

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:  # noqa: ARG002
        """Name the ground."""
        return {"ground": list(GROUNDS)[int(choice["ground"][row])]}


@dataclass(frozen=True)
class Restyle:
    """Redraws the whole picture in a style."""

    name: ClassVar[str]
    known: tuple[str, ...]
    novel: tuple[str, ...]

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:  # noqa: ARG002
        """Choose nothing, because the kind is the style."""
        return {}

    def apply(self, scenes: Scenes, choice: Choice) -> Scenes:  # noqa: ARG002
        """Set the style."""
        return replace(scenes, style=torch.full_like(scenes.style, STYLES.index(self.name)))

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:  # noqa: ARG002
        """Return no values."""
        return {}


@dataclass(frozen=True)
class Outline(Restyle):
    """Draws only the outlines of shapes."""

    name: ClassVar[str] = "outline"
    known: tuple[str, ...] = (
        "draw only the outlines",
        "show only outlines",
        "make it an outline drawing",
        "turn it into outlines",
        "show the picture as outlines",
    )
    novel: tuple[str, ...] = ("turn the picture into outlines", "make it only outlines")


@dataclass(frozen=True)
class Night(Restyle):
    """Darkens everything towards blue."""

    name: ClassVar[str] = "night"
    known: tuple[str, ...] = (
        "make it night",
        "turn it into a night scene",
        "it should be night",
        "turn day into night",
        "show the picture at night",
    )
    novel: tuple[str, ...] = ("make it a night scene", "the picture should be at night")


@dataclass(frozen=True)
class Blur(Restyle):
    """Blurs everything."""

    name: ClassVar[str] = "blur"
    known: tuple[str, ...] = (
        "blur it",
        "make it blurry",
        "blur the picture",
        "the picture should be blurry",
        "turn it blurry",
    )
    novel: tuple[str, ...] = ("make the picture blurry", "it should be blurry")


@dataclass(frozen=True)
class Keep(Restyle):
    """Changes nothing, which a model should learn first. Tests do not use it."""

    name: ClassVar[str] = "none"
    known: tuple[str, ...] = (
        "change nothing",
        "leave it as it is",
        "keep the picture",
        "do nothing",
        "keep it as it is",
    )
    novel: tuple[str, ...] = ("leave the picture as it is", "keep it")


_ALL: tuple[EditKind, ...] = (
    Recolour(),
    Remove(),
    Add(),
    Move(),
    Nudge(),
    Grow(),
    Shrink(),
    Swap(),
    ChangeGround(),
    Outline(),
    Night(),
    Blur(),
)
KINDS = {edit.name: edit for edit in _ALL}
KEEP: EditKind = Keep()
