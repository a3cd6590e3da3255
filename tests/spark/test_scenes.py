"""Scenes and how they are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.spark import grounds
from fluxfire.spark.edits import FREE
from fluxfire.spark.rendering import blur, coverage, look, render
from fluxfire.spark.scenes import LOOKS, SHAKE, SIZES, SLOTS, Dice, draw, join, shaken
from fluxfire.spark.things import NAMES, TINTS, distinct

EXTENTS = [(1.0, 1.0), (160 / 96, 1.0), (1.0, 144 / 112)]


def alone(thing, *, size=0.4, turn=0.0, flip=False, x=0.5, y=0.5, tint=0):
    """One thing on a ground, by day."""
    scene = draw(1, (1.0, 1.0), Dice(0))
    scene = scene.having(
        present=torch.zeros(1, SLOTS, dtype=torch.bool), look=torch.zeros(1, dtype=torch.int64)
    )
    return scene.put(
        torch.zeros(1, dtype=torch.int64),
        thing=NAMES.index(thing), tint=tint, size=size, turn=turn, flip=flip, x=x, y=y,
        present=True,
    )  # fmt: skip


def by_day(n, seed, extent=(1.0, 1.0)):
    scenes = draw(n, extent, Dice("day", seed))
    return scenes.having(look=torch.zeros(n, dtype=torch.int64))


@given(seed=st.integers(0, 2**31), extent=st.sampled_from(EXTENTS))
def test_drawing_is_seeded_and_no_two_things_are_of_one_kind(seed, extent):
    scenes, again = draw(16, extent, Dice("x", seed)), draw(16, extent, Dice("x", seed))
    for name, tensor in scenes.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert all(len(set(row)) == SLOTS for row in scenes.thing.tolist())
    assert not scenes.present[:, FREE].any()
    assert scenes.present[:, 0].all()
    assert (scenes.present.sum(1) <= 3).all()
    assert ((scenes.size >= SIZES[0]) & (scenes.size <= SIZES[1])).all()
    assert distinct()[scenes.thing, scenes.tint].all()


def test_other_seeds_give_other_scenes():
    assert not torch.equal(draw(4, (1.0, 1.0), Dice(1)).x, draw(4, (1.0, 1.0), Dice(2)).x)
    assert not torch.equal(draw(4, (1.0, 1.0), Dice(1, 2)).x, draw(4, (1.0, 1.0), Dice(12)).x)


def test_everything_is_drawn_sometime():
    scenes = draw(6000, (1.0, 1.0), Dice("all"))
    assert set(scenes.thing.flatten().tolist()) == set(range(len(NAMES)))
    assert set(scenes.tint.flatten().tolist()) == set(range(len(TINTS) + 1))
    assert set(scenes.ground.tolist()) == set(range(len(grounds.GROUNDS)))
    assert set(scenes.look.tolist()) == set(range(len(LOOKS)))
    assert set(scenes.present.sum(1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("extent", EXTENTS)
def test_orderly_means_inside_and_apart(extent):
    """The same rule, one scene and one pair of things after the other."""
    scenes = draw(300, extent, Dice("orderly"))

    def orderly(row):
        here = [s for s in range(SLOTS) if scenes.present[row, s]]
        x, y, size = (getattr(scenes, n)[row].tolist() for n in ("x", "y", "size"))
        for s in here:
            if min(x[s], extent[0] - x[s], y[s], extent[1] - y[s]) < 0.45 * size[s]:
                return False
            for t in here:
                apart = max(abs(x[s] - x[t]), abs(y[s] - y[t]))
                if s != t and apart < 0.85 * (size[s] + size[t]) / 2:
                    return False
        return True

    expected = [orderly(row) for row in range(300)]
    assert scenes.orderly().tolist() == expected
    assert 60 < sum(expected) < 240


@pytest.mark.parametrize("extent", EXTENTS)
def test_orderly_scenes_show_every_thing(extent):
    scenes = by_day(40, "show", extent)
    scenes = scenes.take(scenes.orderly())
    assert 5 < len(scenes) < 40
    whole = render(scenes, 48)
    assert whole.shape == (len(scenes), 3, round(48 * extent[1]), round(48 * extent[0]))
    assert whole.min() >= 0
    assert whole.max() <= 1
    for slot in range(SLOTS):
        here = scenes.present[:, slot]
        without = scenes.put(torch.full((len(scenes),), slot), present=False)
        changed = (render(without, 48) - whole).abs().amax((1, 2, 3))
        assert (changed[here] > 0.1).all()
        assert (changed[~here] == 0).all()


def test_a_thing_hides_its_ground_and_darkens_what_is_beside_it():
    scene = alone("panda", size=0.46)
    bare = grounds.draw(scene.ground, scene.seed, *grounds.centres(64, 64))[0]
    picture, cover = render(scene, 64)[0], coverage(scene, 0, 64)[0, 0]
    far = cover.new_zeros(64, 64)
    far[16:59, 16:59] = 1  # the thing, and its shadow to the lower right
    assert torch.equal(picture[:, far == 0], bare[:, far == 0])
    beside = (cover == 0) & (far == 1)
    assert (picture <= bare + 1e-6)[:, beside].all()
    assert (picture < bare - 0.03)[:, beside].any()
    xs = torch.arange(64.0)
    dark = (bare - picture).sum(0) * beside
    assert float((dark.sum(0) * xs).sum() / dark.sum()) > 32
    assert float((dark.sum(1) * xs).sum() / dark.sum()) > 32


def test_things_are_where_their_scenes_say():
    cover = coverage(alone("panda", size=0.4, x=0.3, y=0.6), 0, 100)[0, 0]
    rows, columns = cover.nonzero().unbind(1)
    assert 10 <= columns.min() <= 14  # from 0.3 - 0.2
    assert 46 <= columns.max() <= 50
    assert 40 <= rows.min() <= 44
    assert 76 <= rows.max() <= 80
    wider = coverage(alone("panda", size=0.2, x=0.3, y=0.6), 0, 100)
    assert float(cover.sum() / wider.sum()) == pytest.approx(4, rel=0.02)


def test_flips_mirror_and_turns_turn():
    plain = coverage(alone("guitar"), 0, 64)[0, 0]
    assert (plain - plain.flip(1)).abs().mean() > 0.02
    mirrored = coverage(alone("guitar", flip=True), 0, 64)[0, 0]
    assert torch.allclose(mirrored, plain.flip(1), atol=1e-4)
    turned = coverage(alone("guitar", turn=math.pi / 2), 0, 64)[0, 0]
    assert torch.allclose(turned, plain.rot90(-1), atol=1e-3)  # clockwise, as y goes down


def test_tints_change_colours_and_nothing_else():
    scene = alone("frog", size=0.46)
    red = scene.put(torch.zeros(1, dtype=torch.int64), tint=1 + list(TINTS).index("red"), shade=0)
    before, after = render(scene, 64)[0], render(red, 64)[0]
    outside = coverage(scene, 0, 64)[0, 0] == 0
    assert torch.allclose(before[:, outside], after[:, outside], atol=1e-4)
    inside = coverage(scene, 0, 64)[0, 0] > 0.99
    mean = after[:, inside].mean(1)
    assert mean[0] > 2 * mean[1]
    assert before[1][inside].mean() > before[0][inside].mean()


def test_opacity_goes_from_absent_to_there():
    scenes = by_day(6, "ghosts")
    there, absent = render(scenes, 48), render(scenes.having(present=scenes.present & False), 48)
    for value, expected in ((1.0, there), (0.0, absent)):
        drawn = render(scenes, 48, opacity=torch.full((6, SLOTS), value))
        assert torch.allclose(drawn, expected, atol=1e-6)
    one = scenes.having(present=scenes.present & (torch.arange(SLOTS) == 0))
    half = render(one, 48, opacity=torch.full((6, SLOTS), 0.5))
    full, none = render(one, 48), render(one.having(present=one.present & False), 48)
    covered = coverage(one, 0, 48).expand_as(full) > 0.999
    # Under a whole thing there is no ground, and under half a one there is half, shaded by half.
    expected = 0.5 * full + 0.5 * none
    assert (half <= expected + 1e-5)[covered].all()
    assert (half >= expected - 0.5 * 0.2 * none - 1e-5)[covered].all()


def test_size_in_pixels_does_not_change_a_scene():
    scenes = by_day(6, 5)
    scenes = scenes.having(ground=torch.full((6,), list(grounds.GROUNDS).index("sky")))
    small, large = render(scenes, 64), render(scenes, 256)
    assert (small - torch.nn.functional.avg_pool2d(large, 4)).abs().mean() < 0.015


def test_lights_and_weathers_by_what_they_do():
    picture = grounds.draw(torch.tensor([3, 8]), torch.tensor([1, 2]), *grounds.centres(64, 64))

    def seen(name, *seeds):
        which = torch.full((2,), LOOKS.index(name))
        return look(picture, which, torch.tensor(seeds or (5, 6)), *grounds.centres(64, 64))

    assert torch.equal(seen("day"), picture)
    for name in LOOKS[1:]:
        out = seen(name)
        assert out.min() >= 0
        assert out.max() <= 1
        assert torch.equal(out, seen(name))
        assert (out - picture).abs().mean() > 0.03, name
        assert not torch.equal(out, seen(name, 7, 8)), name
    brightness = picture.mean()
    assert seen("night").mean() < 0.6 * brightness
    warm = seen("evening").mean((0, 2, 3)) / picture.mean((0, 2, 3))
    assert warm[0] > 1.2 * warm[2]
    assert seen("fog").std() < 0.75 * picture.std()
    grey = seen("grey")
    assert torch.allclose(grey.amax(1), grey.amin(1))
    luma = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert torch.corrcoef(torch.stack([grey[:, 0].flatten(), luma.flatten()]))[0, 1] > 0.99
    flakes = seen("snowfall")[0] - (seen("snowfall")[0]).median()
    assert 0.005 < (seen("snowfall")[0].amin(0) > 0.9).float().mean() < 0.3
    assert flakes.max() > 0.2


def test_looks_in_a_batch_are_those_alone():
    picture = torch.rand(len(LOOKS), 3, 32, 32)
    which, seeds = torch.arange(len(LOOKS)), torch.arange(len(LOOKS)) + 50
    at = grounds.centres(32, 32)
    together = look(picture, which, seeds, *at)
    for i in range(len(LOOKS)):
        one = slice(i, i + 1)
        assert torch.allclose(
            together[one], look(picture[one], which[one], seeds[one], *at), atol=1e-5
        )


def test_a_camera_shows_the_whole_scene_from_another_place():
    """Moved by whole pixels, it shows the same pixels elsewhere: things, ground and weather."""
    scenes = draw(12, (1.25, 1.0), Dice("camera"))
    scenes = scenes.having(look=torch.arange(12) % len(LOOKS))
    before = render(scenes, 64)
    moved = scenes.having(camera=torch.tensor([3 / 64, -2 / 64, 0.0]).expand(12, 3))
    after = render(moved, 64)
    differs = (after[:, :, 2:, :-3] - before[:, :, :-2, 3:]).abs().amax(1) > 0.02  # at sharp edges
    assert differs.float().mean() < 0.01
    assert (after - before).abs().mean() > 0.01
    cover = coverage(moved, 0, 64)[..., 2:, :-3]
    assert torch.allclose(cover, coverage(scenes, 0, 64)[..., :-2, 3:], atol=1e-3)


def test_a_wider_camera_shows_more_around_the_middle():
    scenes = draw(6, (1.0, 1.0), Dice("wide"))
    wide = scenes.having(camera=torch.tensor([0.0, 0.0, 1.0]).expand(6, 3))
    inner = render(wide, 128)[:, :, 32:96, 32:96]
    assert (inner - render(scenes, 64)).abs().mean() < 0.01


def test_a_shaken_camera_moves_by_a_pixel_or_two():
    scenes = draw(500, (1.0, 1.0), Dice("shake"))
    seen = shaken(scenes, Dice("shake", 1)).camera
    assert (seen.abs() <= torch.tensor(SHAKE)).all()
    assert (seen.abs().amax(0) > 0.9 * torch.tensor(SHAKE)).all()
    assert seen.mean(0).abs().max() < 0.001
    assert torch.equal(scenes.camera, torch.zeros(500, 3))


def test_putting_changes_one_slot_of_each_scene():
    scenes = draw(5, (1.0, 1.0), Dice("put"))
    slot = torch.tensor([0, 3, 1, 2, 0])
    changed = scenes.put(slot, x=torch.arange(5.0), present=True)
    assert changed.of("x", slot).tolist() == [0, 1, 2, 3, 4]
    assert changed.of("present", slot).all()
    others = torch.ones(5, SLOTS, dtype=torch.bool)
    others[torch.arange(5), slot] = False
    assert torch.equal(changed.x[others], scenes.x[others])
    assert torch.equal(changed.size, scenes.size)
    assert not torch.equal(scenes.x, changed.x)


def test_scenes_are_taken_and_joined():
    scenes = draw(7, (1.0, 1.0), Dice("join"))
    again = join([scenes.take(slice(3)), scenes.take(torch.arange(3, 7))])
    assert len(again) == 7
    assert all(torch.equal(t, again.tensors()[n]) for n, t in scenes.tensors().items())
    assert again.extent == scenes.extent


def test_dice_are_fair_and_keep_to_what_is_allowed():
    dice = Dice("fair")
    allowed = torch.tensor([[True, False, True, True, False]]).expand(3000, -1)
    counts = torch.bincount(dice.which(allowed), minlength=5)
    assert counts[[1, 4]].tolist() == [0, 0]
    assert (counts[[0, 2, 3]] - 1000).abs().max() < 150
    some = dice.some(500, 9, 4)
    assert all(len(set(row)) == 4 for row in some.tolist())
    assert set(some.flatten().tolist()) == set(range(9))
    assert all(sorted(row) == list(range(6)) for row in dice.order(20, 6).tolist())
    numbers = dice.uniform(-2, 3, 1000)
    assert numbers.min() >= -2
    assert numbers.max() < 3
    assert abs(float(numbers.mean()) - 0.5) < 0.3


def test_blur_keeps_flat_pictures_and_spreads_a_point_as_a_gaussian():
    flat = torch.full((1, 3, 20, 20), 0.3)
    assert torch.allclose(blur(flat, 2.0), flat)
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    spread = blur(point, 3.0)[0, 0]
    xs = torch.arange(41) - 20.0
    assert float(spread.sum()) == pytest.approx(1)
    assert float((spread.sum(0) * xs**2).sum()) == pytest.approx(9, rel=0.03)
