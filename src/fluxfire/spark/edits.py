"""The kinds of edit that Spark knows: what each changes, and its wordings.

An instruction leaves much open, as in real editing: where an added thing is and how big, what was
behind a removed one, which beach. So `apply` draws one of many valid results. Some wordings are
held out of training, but training has seen all of their words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.scenes import LOOKS, SLOTS, Dice, Scenes, new_seeds, poses
from fluxfire.spark.things import NAMES, TINTS, article, distinct

Split = Literal["train", "test"]
Choice = Mapping[str, Tensor]
"""What an instruction says of each scene: (N,) int64 tensors by name."""
FREE = SLOTS - 1
"""The slot that no drawn scene fills."""

SIDES = ("on the left", "on the right", "at the top", "at the bottom")
_TO_SIDES = ("to the left", "to the right", "to the top", "to the bottom")
_ANYWHERE = len(SIDES)
WHERE: dict[str, tuple[str, str]] = {
    "sky": ("in the sky", "the sky"),
    "sea": ("on the sea", "the sea"),
    "beach": ("on a beach", "a beach"),
    "meadow": ("in a meadow", "a meadow"),
    "field of flowers": ("in a field of flowers", "a field of flowers"),
    "forest": ("in a forest", "a forest"),
    "desert": ("in a desert", "a desert"),
    "mountains": ("in the mountains", "mountains"),
    "snow": ("on a snowy field", "a snowy field"),
    "stars": ("in space", "the stars"),
    "wooden floor": ("on a wooden floor", "a wooden floor"),
    "brick wall": ("in front of a brick wall", "a brick wall"),
    "stones": ("on a stone pavement", "a stone pavement"),
    "autumn leaves": ("on autumn leaves", "autumn leaves"),
    "water": ("under water", "an underwater scene"),
    "city": ("in a city", "a city"),
    "marble": ("on a marble floor", "a marble floor"),
    "sunset": ("in front of a sunset", "a sunset"),
}
"""Each ground as a place and as a noun, for instructions."""
LOOK_WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "night": (
        ("make it night", "turn day into night", "it should be night", "change it to night time",
         "show it at night"),
        ("make it night time", "turn it into night"),
    ),
    "evening": (
        ("make it evening", "put it in warm evening light", "it should be evening",
         "change the light to evening", "give it warm light"),
        ("make the light warm", "show it in the evening"),
    ),
    "fog": (
        ("add fog", "make it foggy", "it should be foggy", "fill the picture with fog",
         "make the air foggy"),
        ("put it in fog", "show it in fog"),
    ),
    "rain": (
        ("make it rain", "add rain", "let it rain", "it should rain", "make it rainy"),
        ("it should be rainy", "put it in the rain"),
    ),
    "snowfall": (
        ("make it snow", "let it snow", "make it winter", "add falling snow", "it should snow"),
        ("it should be winter", "show it in falling snow"),
    ),
    "grey": (
        ("make it black and white", "turn it into a black and white picture", "remove all colour",
         "make the picture grey", "take away the colour"),
        ("it should be black and white", "take away all colour"),
    ),
}  # fmt: skip
"""Wordings of each look: those of training, then those that are held out."""


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
        """Choose randomly what to ask of each scene."""

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:
        """Return a valid result for each scene: one of many."""

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Return the values of a wording's placeholders in one row."""


def noun(scenes: Scenes, row: int, slot: int) -> str:
    """Return a thing's name, such as "cat" or "blue cat"."""
    name, tint = NAMES[int(scenes.thing[row, slot])], int(scenes.tint[row, slot])
    return f"{list(TINTS)[tint - 1]} {name}" if tint else name


def _subject(scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
    return {"subject": dice.which(scenes.present)}


def _it(scenes: Scenes, choice: Choice, row: int) -> str:
    """Name a thing of the scene, by its kind alone: no two are of one kind."""
    return NAMES[int(scenes.thing[row, int(choice["subject"][row])])]


def _side(n: int, dice: Dice, *, anywhere: float) -> Tensor:
    free = dice.uniform(0, 1, n) < anywhere
    return torch.where(free, _ANYWHERE, dice.below(len(SIDES), n))


def is_at(side: Tensor, x: Tensor, y: Tensor, extent: tuple[float, float]) -> Tensor:
    """Whether points are at the sides that instructions name: (N,) bool."""
    width, height = extent
    at = torch.stack(
        [x < 0.42 * width, x > 0.58 * width, y < 0.42 * height, y > 0.58 * height,
         torch.ones_like(x, dtype=torch.bool)]
    )  # fmt: skip
    return at[side, torch.arange(len(x))]


def _pose(scenes: Scenes, side: Tensor, dice: Dice, *names: str) -> dict[str, Tensor]:
    """Draw where a thing is now, on the side asked for."""
    n = len(scenes)
    width, height = scenes.extent
    new = {name: value[:, 0] for name, value in poses(n, scenes.extent, dice).items()}
    low, high = dice.uniform(0.15, 0.40, n), dice.uniform(0.60, 0.85, n)
    new["x"] = torch.where(side == 0, low * width, new["x"])
    new["x"] = torch.where(side == 1, high * width, new["x"])
    new["y"] = torch.where(side == 2, low.clamp_min(0.18) * height, new["y"])  # noqa: PLR2004
    new["y"] = torch.where(side == 3, high * height, new["y"])  # noqa: PLR2004
    return {name: new[name] for name in names}


@dataclass(frozen=True)
class Add:
    """Adds a thing, anywhere or on one side."""

    name: ClassVar[str] = "add"
    known: tuple[str, ...] = (
        "add {new} {place}",
        "put {new} {place}",
        "place {new} {place}",
        "draw {new} {place}",
        "there should be {new} {place}",
        "insert {new} {place}",
        "give it {new} {place}",
    )
    novel: tuple[str, ...] = (
        "give the picture {new} {place}",
        "put {new} in it {place}",
        "draw {new} in the picture {place}",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a side or none; the free slot's thing was drawn with the scene."""
        n = len(scenes)
        return {"subject": torch.full((n,), FREE), "side": _side(n, dice, anywhere=0.6)}

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:
        """Fill the free slot."""
        pose = _pose(scenes, choice["side"], dice, "x", "y", "size", "turn", "flip", "shade")
        return scenes.put(choice["subject"], present=True, **pose)

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name what and where."""
        side = int(choice["side"][row])
        place = "" if side == _ANYWHERE else SIDES[side]
        return {"new": article(noun(scenes, row, FREE)), "place": place}


@dataclass(frozen=True)
class Remove:
    """Removes a thing; what was behind it is free."""

    name: ClassVar[str] = "remove"
    known: tuple[str, ...] = (
        "remove the {it}",
        "delete the {it}",
        "take the {it} away",
        "erase the {it}",
        "get rid of the {it}",
        "make the {it} disappear",
        "the {it} should be gone",
    )
    novel: tuple[str, ...] = ("take away the {it}", "the {it} should disappear")

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a thing."""
        return _subject(scenes, dice)

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:  # noqa: ARG002
        """Unset its presence."""
        return scenes.put(choice["subject"], present=False)

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name the thing."""
        return {"it": _it(scenes, choice, row)}


@dataclass(frozen=True)
class Replace:
    """Puts another thing about where one was; its size and turn are free."""

    name: ClassVar[str] = "replace"
    known: tuple[str, ...] = (
        "replace the {it} with {new}",
        "turn the {it} into {new}",
        "change the {it} to {new}",
        "make the {it} {new}",
        "exchange the {it} for {new}",
        "swap the {it} for {new}",
    )
    novel: tuple[str, ...] = (
        "change the {it} into {new}",
        "exchange the {it} with {new}",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a thing; the new one is the free slot's."""
        return _subject(scenes, dice)

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:
        """Set the thing and its pose."""
        subject, n = choice["subject"], len(scenes)
        anywhere = torch.full((n,), _ANYWHERE)
        pose = _pose(scenes, anywhere, dice, "size", "turn", "flip", "shade")
        x, y = (scenes.of(a, subject) + dice.uniform(-0.03, 0.03, n) for a in ("x", "y"))
        return scenes.put(
            subject, thing=scenes.thing[:, FREE], tint=scenes.tint[:, FREE], x=x, y=y, **pose
        )

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name both."""
        return {"it": _it(scenes, choice, row), "new": article(noun(scenes, row, FREE))}


@dataclass(frozen=True)
class Recolour:
    """Gives a thing one of the named colours; which shade is free."""

    name: ClassVar[str] = "recolour"
    known: tuple[str, ...] = (
        "make the {it} {colour}",
        "paint the {it} {colour}",
        "turn the {it} {colour}",
        "change the colour of the {it} to {colour}",
        "the {it} should be {colour}",
        "give the {it} a {colour} colour",
    )
    novel: tuple[str, ...] = ("make the colour of the {it} {colour}", "change the {it} to {colour}")

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a thing and another colour."""
        chosen = _subject(scenes, dice)
        thing, tint = (scenes.of(name, chosen["subject"]) for name in ("thing", "tint"))
        visible = distinct()[thing].clone()
        visible[:, 0] = False
        visible[torch.arange(len(scenes)), tint] = False
        return {**chosen, "tint": dice.which(visible)}

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:
        """Set tint and shade."""
        shade = dice.uniform(-1, 1, len(scenes))
        return scenes.put(choice["subject"], tint=choice["tint"], shade=shade)

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name thing and colour."""
        return {"it": _it(scenes, choice, row), "colour": list(TINTS)[int(choice["tint"][row]) - 1]}


@dataclass(frozen=True)
class Move:
    """Moves a thing to a side; where exactly is free."""

    name: ClassVar[str] = "move"
    known: tuple[str, ...] = (
        "move the {it} {to}",
        "shift the {it} {to}",
        "bring the {it} {to}",
        "put the {it} {place}",
        "the {it} should be {place}",
    )
    novel: tuple[str, ...] = ("place the {it} {place}", "the {it} should move {to}")

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a thing and a side."""
        return {**_subject(scenes, dice), "side": _side(len(scenes), dice, anywhere=0.0)}

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:
        """Set the centre."""
        return scenes.put(choice["subject"], **_pose(scenes, choice["side"], dice, "x", "y"))

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:
        """Name what and where."""
        side = int(choice["side"][row])
        return {"it": _it(scenes, choice, row), "to": _TO_SIDES[side], "place": SIDES[side]}


@dataclass(frozen=True)
class Ground:
    """Puts everything on another ground of a named kind; which one is free."""

    name: ClassVar[str] = "ground"
    known: tuple[str, ...] = (
        "put it {where}",
        "change the background to {what}",
        "replace the background with {what}",
        "make the background {what}",
        "show it {where}",
        "use {what} as the background",
        "move it all {where}",
        "place everything {where}",
    )
    novel: tuple[str, ...] = (
        "it should be {where}",
        "put everything {where}",
        "the background should be {what}",
    )

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose another kind of ground."""
        other = 1 + dice.below(len(GROUNDS) - 1, len(scenes))
        return {"ground": (scenes.ground + other) % len(GROUNDS)}

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:
        """Set kind and seed."""
        return scenes.having(ground=choice["ground"], seed=new_seeds(len(scenes), dice))

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:  # noqa: ARG002
        """Name the ground."""
        where, what = WHERE[list(GROUNDS)[int(choice["ground"][row])]]
        return {"where": where, "what": what}


@dataclass(frozen=True)
class Look:
    """Changes the light or the weather; how strongly, and where each flake falls, is free."""

    name: ClassVar[str] = "look"
    known: tuple[str, ...] = tuple(f"{{known{i}}}" for i in range(5))
    novel: tuple[str, ...] = tuple(f"{{novel{i}}}" for i in range(2))

    def draw(self, scenes: Scenes, dice: Dice) -> dict[str, Tensor]:
        """Choose a look."""
        return {"look": 1 + dice.below(len(LOOKS) - 1, len(scenes))}

    def apply(self, scenes: Scenes, choice: Choice, dice: Dice) -> Scenes:
        """Set look and seed."""
        return scenes.having(look=choice["look"], weather=new_seeds(len(scenes), dice))

    def fields(self, scenes: Scenes, choice: Choice, row: int) -> dict[str, str]:  # noqa: ARG002
        """Return the look's own wordings."""
        known, novel = LOOK_WORDINGS[LOOKS[int(choice["look"][row])]]
        return {
            **{f"known{i}": words for i, words in enumerate(known)},
            **{f"novel{i}": words for i, words in enumerate(novel)},
        }


KINDS: dict[str, EditKind] = {
    kind.name: kind for kind in (Add(), Remove(), Replace(), Recolour(), Move(), Ground(), Look())
}
"""The kinds of edit, by name."""
LOCAL = ("add", "remove", "replace", "recolour", "move")
"""Kinds that leave most of the picture as it is."""
WHOLE = ("ground", "look")
"""Kinds that change the whole picture."""
KEEP = (
    "change nothing",
    "leave everything as it is",
    "keep the picture as it is",
    "do not change it",
)
"""Instructions that ask for no change."""
