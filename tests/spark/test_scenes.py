"""Scenes and how they are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.spark.edits import FREE
from fluxfire.spark.rendering import blur, render
from fluxfire.spark.scenes import COLOURS, GROUNDS, PALETTE, PATTERNS, SHAPES, SLOTS, Dice, draw

EXTENTS = [(1.0, 1.0), (160 / 96, 1.0), (1.0, 144 / 112)]


def alone(shape, *, size=0.3, angle=0.0, colour="red", ground="white"):
    """One shape in the middle of a named ground."""
    n = torch.arange(1)
    scene = draw(1, (1.0, 1.0), Dice(0)).on(n + list(GROUNDS).index(ground))
    scene = replace(scene, present=torch.zeros(1, SLOTS, dtype=torch.bool))
    return scene.put(
        n * 0,
        shape=SHAPES.index(shape),
        tint=PALETTE[[list(COLOURS).index(colour)]],
        x=0.5,
        y=0.5,
        size=size,
        angle=angle,
        present=True,
    )


def cover(scene, side=256):
    """Share of the picture that the one shape covers."""
    bare = replace(scene, present=torch.zeros_like(scene.present))
    difference = (render(scene, side) - render(bare, side)).abs().sum(1)
    return float((difference / difference.max()).mean())


@given(seed=st.integers(0, 2**31), extent=st.sampled_from(EXTENTS))
def test_drawing_is_seeded_and_says_which_shape_is_meant(seed, extent):
    scenes, again = draw(16, extent, Dice("x", seed)), draw(16, extent, Dice("x", seed))
    for name, tensor in scenes.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    pairs = scenes.shape * len(COLOURS) + scenes.colour
    assert all(len(set(row)) == SLOTS for row in pairs.tolist())
    assert not scenes.present[:, FREE].any()
    assert ((scenes.present.sum(1) >= 2) & (scenes.present.sum(1) <= 4)).all()


def test_other_seeds_give_other_scenes():
    assert not torch.equal(draw(4, (1.0, 1.0), Dice(1)).x, draw(4, (1.0, 1.0), Dice(2)).x)
    assert not torch.equal(draw(4, (1.0, 1.0), Dice(1, 2)).x, draw(4, (1.0, 1.0), Dice(12)).x)


@pytest.mark.parametrize("extent", EXTENTS)
def test_orderly_scenes_show_every_shape(extent):
    scenes = draw(200, extent, Dice("orderly"))
    scenes = scenes.take(scenes.orderly())
    assert 10 < len(scenes) < 200
    whole = render(scenes, 64)
    assert whole.shape == (len(scenes), 3, round(64 * extent[1]), round(64 * extent[0]))
    assert whole.min() >= 0
    assert whole.max() <= 1
    for slot in range(FREE):
        here = scenes.present[:, slot]
        without = scenes.put(torch.full((len(scenes),), slot), present=False)
        changed = (render(without, 64) - whole).abs().amax((1, 2, 3))
        assert (changed[here] > 0.1).all()
        assert (changed[~here] == 0).all()


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        # Areas by geometry, in units of the size squared.
        ("circle", torch.pi * 0.81),
        ("square", 2.25),
        ("triangle", 3 * 3**0.5 / 4),
        ("star", 5 * 0.45 * 0.5877852523),
        ("ring", torch.pi * (0.96**2 - 0.48**2)),
        ("cross", 2 * 1.9 * 0.64 - 0.64**2),
    ],
)
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_shapes_have_the_area_that_geometry_gives(shape, area, angle):
    assert cover(alone(shape, angle=angle)) == pytest.approx(area * 0.09, rel=0.02)


def test_shapes_have_their_tint_inside_and_the_ground_outside():
    picture = render(alone("circle", colour="blue", ground="brown"), 64)[0]
    assert torch.allclose(picture[:, 32, 32], torch.tensor(COLOURS["blue"]))
    assert torch.allclose(picture[:, 0, 0], torch.tensor(GROUNDS["brown"].tones[0]))


@pytest.mark.parametrize("ground", GROUNDS)
def test_named_grounds_are_told_apart(ground):
    scenes = draw(len(GROUNDS), (1.0, 1.0), Dice(3)).on(torch.arange(len(GROUNDS)))
    drawn = render(replace(scenes, present=torch.zeros_like(scenes.present)), 64)
    mine = list(GROUNDS).index(ground)
    apart = (drawn - drawn[mine]).abs().mean((1, 2, 3))
    assert (apart > 0.05).sum() == len(GROUNDS) - 1
    flat = drawn[mine].flatten(1).std(1).max() < 1e-6
    assert flat == (GROUNDS[ground].pattern == "plain")
    assert GROUNDS[ground].pattern in PATTERNS


def test_size_in_pixels_does_not_change_the_scene():
    scenes = draw(8, (1.0, 1.0), Dice(5))
    small, large = render(scenes, 64), render(scenes, 256)
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - shrunk).abs().mean() < 0.01


def test_blur_keeps_flat_pictures_and_spreads_a_point_as_a_gaussian():
    flat = torch.full((1, 3, 20, 20), 0.3)
    assert torch.allclose(blur(flat, 2.0), flat)
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    spread = blur(point, 3.0)[0, 0]
    xs = torch.arange(41) - 20.0
    assert float(spread.sum()) == pytest.approx(1)
    assert float((spread.sum(0) * xs**2).sum()) == pytest.approx(9, rel=0.03)
