"""Captions for text to image: two shapes at named places, with canonical size and angle."""

from __future__ import annotations

from dataclasses import replace

import torch

from fluxfire.spark.edits import PLACES, noun, place
from fluxfire.spark.scenes import (
    CANONICAL_SIZE,
    GROUNDS,
    PALETTE,
    SLOTS,
    Dice,
    Scenes,
    draw,
)

_SHAPES = 2
CAPTIONS = (
    "a {one} {here} and a {two} {there} on a {ground} background",
    "a picture of a {one} {here} and a {two} {there} on a {ground} background",
    "draw a {one} {here} and a {two} {there} on a {ground} background",
    "there should be a {one} {here} and a {two} {there} on a {ground} background",
)


def draw_captioned(n: int, extent: tuple[float, float], dice: Dice) -> tuple[Scenes, list[str]]:
    """Draw n scenes with captions that describe them completely."""
    scenes = draw(n, extent, dice)
    places = dice.order(n, len(PLACES))[:, :SLOTS]
    ground = dice.below(len(GROUNDS), n)
    x, y = (t.reshape(n, SLOTS) for t in place(places.flatten(), extent))
    scenes = replace(
        scenes,
        x=x,
        y=y,
        size=torch.full_like(x, CANONICAL_SIZE),
        angle=torch.zeros_like(x),
        tint=PALETTE[scenes.colour],
        present=(torch.arange(SLOTS) < _SHAPES).expand(n, -1),
    ).on(ground)
    named = list(PLACES)
    captions = [
        CAPTIONS[int(which)]
        .format(
            one=noun(scenes, row, 0),
            here=named[int(places[row, 0])],
            two=noun(scenes, row, 1),
            there=named[int(places[row, 1])],
            ground=list(GROUNDS)[int(ground[row])],
        )
        .replace("a orange", "an orange")
        for row, which in enumerate(dice.below(len(CAPTIONS), n))
    ]
    return scenes, captions
