"""Captions for text to image: one to three things on a ground, in a light or weather."""

from __future__ import annotations

from fluxfire.spark.edits import WHERE, noun
from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.scenes import LOOKS, Dice, Scenes, draw
from fluxfire.spark.things import article

CAPTIONS = (
    "{things} {where}{look}",
    "a picture of {things} {where}{look}",
    "{where} there is {things}{look}",
    "draw {things} {where}{look}",
    "show {things} {where}{look}",
)
IN_LOOKS = {
    "day": "",
    "night": " at night",
    "evening": " in warm evening light",
    "fog": " in fog",
    "rain": " in the rain",
    "snowfall": " in falling snow",
    "grey": " in black and white",
}


def draw_captioned(n: int, extent: tuple[float, float], dice: Dice) -> tuple[Scenes, list[str]]:
    """Draw n scenes with captions that name everything in them, but not where."""
    scenes = draw(3 * n + 8, extent, dice)
    scenes = scenes.take(scenes.orderly()).take(slice(n))
    return scenes, [_caption(scenes, row, dice) for row in range(len(scenes))]


def _caption(scenes: Scenes, row: int, dice: Dice) -> str:
    slots = [s for s in range(scenes.present.shape[1]) if scenes.present[row, s]]
    return CAPTIONS[int(dice.below(len(CAPTIONS), 1))].format(
        things=" and ".join(article(noun(scenes, row, slot)) for slot in slots),
        where=WHERE[list(GROUNDS)[int(scenes.ground[row])]][0],
        look=IN_LOOKS[LOOKS[int(scenes.look[row])]],
    )
