"""The grounds, and the noise that they are drawn with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.spark import grounds, noise
from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.noise import Chance

SIDE = 48
kinds = pytest.mark.parametrize("kind", range(len(GROUNDS)), ids=list(GROUNDS))


def drawn(kind, *seeds, width=SIDE, height=SIDE):
    which = torch.full((len(seeds),), kind)
    return grounds.draw(which, torch.tensor(seeds), *grounds.centres(width, height))


@kinds
def test_a_ground_depends_on_its_kind_and_seed_alone(kind):
    three = drawn(kind, 5, 99, 5)
    assert three.shape == (3, 3, SIDE, SIDE)
    assert torch.isfinite(three).all()
    assert three.min() >= 0
    assert three.max() <= 1
    assert torch.equal(three[0], three[2])
    assert (three[0] - three[1]).abs().mean() > 0.02
    mixed = grounds.draw(
        torch.tensor([(kind + 1) % len(GROUNDS), kind]),
        torch.tensor([1, 99]),
        *grounds.centres(SIDE, SIDE),
    )
    assert torch.allclose(mixed[1], three[1], atol=1e-5)


@kinds
def test_a_ground_is_not_flat(kind):
    for picture in drawn(kind, 1, 2, 3):
        assert picture.flatten(1).std(1).max() > 0.01


@kinds
def test_size_in_pixels_does_not_change_a_ground(kind):
    small, large = drawn(kind, 7, 8), drawn(kind, 7, 8, width=4 * SIDE, height=4 * SIDE)
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    foreign = (small[0] - shrunk[1]).abs().mean()
    for one, other in zip(small, shrunk, strict=True):
        apart = (one - other).abs().mean()
        assert apart < 0.07
        assert apart < 0.6 * foreign


@kinds
def test_wide_and_tall_pictures_show_more_of_the_same_ground(kind):
    square = drawn(kind, 11)
    wide = drawn(kind, 11, width=SIDE + 16)
    assert torch.allclose(wide[..., :SIDE], square, atol=1e-5)
    tall = drawn(kind, 11, height=SIDE + 16)
    differs = (tall[..., 16:, :] - square).abs().amax(1) > 0.01  # by rounding, at sharp edges
    assert differs.float().mean() < 0.01


def test_kinds_are_told_apart():
    pictures = grounds.draw(
        torch.arange(len(GROUNDS)), torch.full((len(GROUNDS),), 3), *grounds.centres(SIDE, SIDE)
    ).flatten(1)
    apart = torch.cdist(pictures, pictures, p=1) / pictures.shape[1]
    apart.fill_diagonal_(1)
    assert apart.min() > 0.05


def test_no_ground_draws_more_numbers_than_there_are():
    x = torch.rand(1, 4, 4)
    for ground in GROUNDS.values():
        chance = Chance(torch.tensor([1]))
        ground(chance, x, x)
        assert 0 < chance._drawn < noise._DRAWS - 32  # cells take theirs from the end


def cell(table, place, i, j):
    """The table's number of a cell, by integers of Python."""
    return float(table[(place + 40503 * i + 30011 * j) % 65536])


@given(
    place=st.integers(0, 2**32 - 1), x=st.floats(-40, 40, width=16), y=st.floats(-40, 40, width=16)
)
def test_smooth_noise_by_arithmetic(place, x, y):
    table = torch.rand(65536, generator=torch.Generator().manual_seed(1))
    mine = noise.smooth(
        table, torch.tensor([[[place]]]), torch.tensor([[[x]]]), torch.tensor([[[y]]])
    )
    u, v = x + (place >> 16) % 256 / 256, y + (place >> 24) % 256 / 256
    i, j = int(np.floor(u)), int(np.floor(v))
    ease = [3 * t**2 - 2 * t**3 for t in (u - i, v - j)]
    rows = [
        (1 - ease[0]) * cell(table, place, i, j + k) + ease[0] * cell(table, place, i + 1, j + k)
        for k in (0, 1)
    ]
    expected = 2 * ((1 - ease[1]) * rows[0] + ease[1] * rows[1]) - 1
    assert float(mine) == pytest.approx(expected, abs=1e-3)


def test_scattered_points_are_the_nearest_of_all():
    table = torch.rand(65536, generator=torch.Generator().manual_seed(2))
    place = 12345
    random = np.random.default_rng(0)
    xs, ys = random.uniform(-4, 4, (2, 400))
    points = np.array(
        [
            (
                i + 0.1 + 0.8 * cell(table, place, i, j),
                j + 0.1 + 0.8 * cell(table, place + 9973, i, j),
                cell(table, place + 2 * 9973, i, j),
            )
            for i, j in itertools.product(range(-7, 8), repeat=2)
        ]
    )
    far = np.hypot(points[:, 0] - xs[:, None], points[:, 1] - ys[:, None])
    order = far.argsort(1)
    near, second, number = (
        t[0, 0].numpy()
        for t in noise.scattered(
            table,
            torch.tensor([[[place]]]),
            torch.tensor(xs, dtype=torch.float32)[None, None],
            torch.tensor(ys, dtype=torch.float32)[None, None],
        )
    )
    rows = np.arange(len(xs))
    right = np.abs(near - far[rows, order[:, 0]]) < 1e-4
    assert right.mean() > 0.99  # a point may hide two cells away
    assert np.allclose(number[right], points[order[:, 0], 2][right])
    assert (np.abs(second - far[rows, order[:, 1]]) < 1e-4).mean() > 0.95
    assert (second >= near).all()


def test_a_pattern_does_not_repeat_within_a_picture():
    steps = range(-150, 151)
    same = [
        (i, j)
        for i, j in itertools.product(steps, steps)
        if (noise._ROW * i + noise._COLUMN * j) % 65536 == 0 and i * i + j * j <= 150**2
    ]
    assert same == [(0, 0)]


def test_numbers_are_within_bounds_and_spread_evenly():
    chance = Chance(torch.arange(4000))
    first, second = (chance.number(2.0, 6.0).flatten() for _ in range(2))
    for numbers in (first, second):
        assert numbers.min() >= 2
        assert numbers.max() <= 6
        counts = torch.histc(numbers, 8, 2, 6)
        assert (counts - 500).abs().max() < 5 * 500**0.5
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.08
    assert torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].abs() < 0.08
    again = Chance(torch.arange(4000))
    assert torch.equal(again.number(2.0, 6.0).flatten(), first)


def test_picked_colours_are_those_given_or_near():
    colours = [(0.1, 0.2, 0.3), (0.7, 0.6, 0.5)]
    chance = Chance(torch.arange(400))
    exact = chance.pick(colours)[:, :, 0, 0]
    table = torch.tensor(colours)
    which = torch.cdist(exact, table).argmin(1)
    assert torch.allclose(exact, table[which])
    assert 140 < int(which.sum()) < 260
    near = chance.pick(colours, 0.05)[:, :, 0, 0]
    off = (near - table[torch.cdist(near, table).argmin(1)]).abs()
    assert 0.04 < off.max() <= 0.05 + 1e-6


def test_cells_have_numbers_of_their_own():
    chance = Chance(torch.tensor([1, 2]))
    i, j = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    i, j = i.expand(2, -1, -1), j.expand(2, -1, -1)
    one, other = chance.cells(i, j), chance.cells(i, j, which=1)
    assert torch.equal(one, chance.cells(i, j))
    for numbers in (one, other):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert abs(float(numbers.mean()) - 0.5) < 0.05
    assert not torch.equal(one[0], one[1])
    assert (one == other).float().mean() < 0.01
    assert len(one[0].unique()) > 890


def test_clouds_are_a_sum_of_ever_finer_noise():
    x, y = 4 * torch.rand(2, 1, 16, 16)
    clouds = Chance(torch.tensor([3])).clouds(x, y, 4, 0.6)
    chance = Chance(torch.tensor([3]))
    parts = [0.6**k * chance.noise(2.03**k * x, 2.03**k * y) for k in range(4)]
    assert torch.allclose(clouds, 1.6 * sum(parts) / (1 + 0.6 + 0.36 + 0.216), atol=1e-3)
    assert 0.5 < clouds.abs().max() < 1.7
