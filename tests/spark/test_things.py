"""The things: their file, their shadows and their colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfire.spark import things
from fluxfire.spark.things import NAMES, THINGS, TINTS

LEAST_APART = 0.03
"""Mean difference of the two things that look most alike."""


def test_names_and_code_points_are_given_once():
    assert len(NAMES) >= 200
    assert len(set(THINGS.values())) == len(THINGS)
    assert all(name == name.lower().strip() and name for name in NAMES)
    assert not set(NAMES) & set(TINTS)


def test_the_file_has_a_place_for_each_thing_and_no_more():
    with Image.open(things.FILE) as sheet:
        assert sheet.mode == "RGBA"
        assert sheet.width == 16 * 64
        assert sheet.height == 64 * -(-len(THINGS) // 16)
        left = np.asarray(sheet)[-64:, 64 * (len(THINGS) % 16) :]
    assert left.size
    assert (left[..., 3] == 0).all()


@pytest.mark.parametrize("index", [0, 15, 16, len(THINGS) - 1])
def test_pictures_are_those_of_the_file(index):
    row, column = divmod(index, 16)
    with Image.open(things.FILE) as sheet:
        tile = sheet.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
        pixels = np.asarray(tile).astype(np.float64) / 255
    mine = things.pictures()[index].double().numpy()
    assert np.allclose(mine[3], pixels[..., 3], atol=1e-6)
    assert np.allclose(mine[:3], (pixels[..., :3] * pixels[..., 3:]).transpose(2, 0, 1), atol=1e-6)


def test_every_thing_fills_its_square_but_not_its_rim():
    sprites = things.pictures()
    assert sprites.shape == (len(THINGS), 5, 64, 64)
    assert sprites.min() >= 0
    assert sprites.max() <= 1 + 1e-6
    assert (sprites[:, :3] <= sprites[:, 3:4] + 1e-6).all()
    opaque = sprites[:, 3] > 0.5
    share = opaque.float().mean((1, 2))
    assert share.min() > 0.08, NAMES[int(share.argmin())]
    assert share.max() < 0.95
    rim = sprites[:, 3].clone()
    rim[:, 1:-1, 1:-1] = 0
    assert rim.max() == 0
    wide = opaque.any(1).sum(1)
    high = opaque.any(2).sum(1)
    assert torch.maximum(wide, high).min() >= 56


def test_no_two_things_look_alike():
    flat = things.pictures()[:, :4].flatten(1)
    apart = torch.cdist(flat, flat, p=1) / flat.shape[1]
    apart.fill_diagonal_(1)
    one, two = divmod(int(apart.argmin()), len(apart))
    assert apart.min() > LEAST_APART, (NAMES[one], NAMES[two])


def test_shadows_are_the_opacity_under_a_gaussian():
    offsets = np.arange(64)[:, None] - np.arange(64)
    bell = np.exp(-(offsets**2) / 50.0) * (np.abs(offsets) <= 15)
    bell /= np.exp(-(np.arange(-15, 16) ** 2) / 50.0).sum()
    for index in (3, 77):
        opacity, shadow = things.pictures()[index, 3:].double().numpy()
        assert np.allclose(bell @ opacity @ bell.T, shadow, atol=1e-5)


def test_paint_by_arithmetic():
    grey = torch.tensor([0.0, 0.3, 0.55, 0.8, 1.0])
    sprite = torch.zeros(2, 5, 1, 5)
    sprite[:, :3] = grey * 0.5
    sprite[:, 3], sprite[:, 4] = 0.5, 0.25
    red = 1 + list(TINTS).index("red")
    done = things.painted(sprite, torch.tensor([0, red]), torch.tensor([0.7, 0.5]))
    assert torch.equal(done[0], sprite[0])
    assert torch.equal(done[:, 3:], sprite[:, 3:])
    for channel, value in enumerate(TINTS["red"]):
        tone = value * 1.08
        expected = [
            tone * (0.25 + 0.75 * g / 0.55) if g < 0.549 else tone + (1 - tone) * (g - 0.55)
            for g in grey.tolist()
        ]
        assert done[1, channel, 0].tolist() == pytest.approx([0.5 * e for e in expected], abs=1e-5)


@pytest.mark.parametrize("tint", TINTS)
def test_a_painted_thing_has_its_colour(tint):
    sprites = things.pictures()
    which = torch.full((len(sprites),), 1 + list(TINTS).index(tint))
    done = things.painted(sprites, which, torch.zeros(len(sprites)))
    mean = done[:, :3].sum((2, 3)) / done[:, 3:4].sum((2, 3))
    # Paint varies in lightness, so colours are compared by their direction away from grey.
    table = torch.tensor(list(TINTS.values()))
    away = torch.nn.functional.normalize(mean - mean.mean(1, keepdim=True), dim=1)
    wanted = torch.nn.functional.normalize(table - table.mean(1, keepdim=True), dim=1)
    nearest = (away @ wanted.T).argmax(1)
    assert (nearest == list(TINTS).index(tint)).float().mean() >= 0.97


def test_brightness_is_that_of_the_eye():
    picture = torch.eye(3)[:, :, None, None]  # pure red, green and blue
    assert things.luma(picture).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_paint_that_shows_nothing_is_known():
    seen = things.distinct()
    assert seen.shape == (len(NAMES), len(TINTS) + 1)
    assert seen[:, 0].all()
    assert (seen[:, 1:].sum(1) >= 2).all()  # else a recolouring could find no other colour
    for name, tint in (("lemon", "yellow"), ("banana", "yellow"), ("tomato", "red")):
        assert not seen[NAMES.index(name), 1 + list(TINTS).index(tint)], (name, tint)
        assert seen[NAMES.index(name), 1 + list(TINTS).index("blue")], name


def test_articles():
    vowels = ("ant", "elephant", "eagle", "owl", "octopus", "otter", "ice cream", "umbrella")
    others = ("unicorn", "cat", "hedgehog", "honey pot", "house", "yellow owl")
    assert [things.article(noun) for noun in vowels] == [f"an {noun}" for noun in vowels]
    assert [things.article(noun) for noun in others] == [f"a {noun}" for noun in others]
    assert things.article("orange cat") == "an orange cat"
    with_u = {name for name in NAMES if name.startswith("u")}
    assert with_u <= {"unicorn", "umbrella"}
