"""The recogniser: its answers' meaning, and the labels that it learns from."""

from __future__ import annotations

import math

import pytest
import torch

from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.recogniser import NOTHING, SMUDGE, STRIDE, UNCLEAR, Recogniser, _peaks
from fluxfire.spark.scenes import LOOKS, SLOTS, Dice, draw
from fluxfire.spark.things import NAMES, TINTS
from spark_training.recogniser import labels, loss_of, scenes_for, spoil, vary

SIZES = [(128, 128), (160, 96), (96, 160)]
IGNORED = -100


def test_answers_have_their_places():
    assert len(NAMES) == NOTHING
    assert len(NAMES) + 1 == SMUDGE
    assert len(GROUNDS) == UNCLEAR
    net = Recogniser().eval()
    for width, height in SIZES:
        cells = height // STRIDE, width // STRIDE
        things, tints, boxes, grounds, looks = net(torch.rand(2, 3, height, width))
        assert things.shape == (2, len(NAMES) + 2, *cells)
        assert tints.shape == (2, len(TINTS) + 1, *cells)
        assert boxes.shape == (2, 3, *cells)
        assert grounds.shape == (2, len(GROUNDS) + 1)
        assert looks.shape == (2, len(LOOKS))
    assert 2 * sum(p.numel() for p in net.parameters()) < 3 * 2**20


def test_looking_at_pictures_says_what_each_shows():
    net = Recogniser().eval()
    pictures = torch.rand(3, 3, 64, 96)
    seen = net.look_at(pictures)
    assert len(seen) == 3
    *_, grounds, looks = net(pictures)
    for i, one in enumerate(seen):
        assert torch.allclose(one.ground, grounds[i].softmax(0), atol=1e-5)
        assert torch.allclose(one.look, looks[i].softmax(0), atol=1e-5)
        assert not one.ground.requires_grad


def expected_labels(scenes, smudged, size):
    """The same, cell by cell."""
    width, height = size
    shorter, n = min(size), len(scenes)
    h, w = height // 8, width // 8
    things = [[[NOTHING] * w for _ in range(h)] for _ in range(n)]
    tints = [[[IGNORED] * w for _ in range(h)] for _ in range(n)]
    boxes = {}
    for i in range(n):
        for row in range(h):
            for column in range(w):
                for s in range(SLOTS):
                    if not scenes.present[i, s]:
                        continue
                    side = float(scenes.size[i, s]) * shorter  # pixels
                    dx = float(scenes.x[i, s]) * shorter - (8 * column + 4)
                    dy = float(scenes.y[i, s]) * shorter - (8 * row + 4)
                    far = max(abs(dx), abs(dy))
                    if far < max(0.14 * side, 0.51 * 8):
                        smudge = bool(smudged[i, s])
                        things[i][row][column] = SMUDGE if smudge else int(scenes.thing[i, s])
                        tints[i][row][column] = IGNORED if smudge else int(scenes.tint[i, s])
                        boxes[i, row, column] = (dx / 8, dy / 8, math.log(side / 128))
                    elif far < 0.5 * side and things[i][row][column] == NOTHING:
                        things[i][row][column] = IGNORED
    return torch.tensor(things), torch.tensor(tints), boxes


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_labels_by_arithmetic_on_every_cell(size):
    shorter = min(size)
    scenes = draw(30, (size[0] / shorter, size[1] / shorter), Dice("labels"))
    scenes = scenes.take(scenes.orderly()).take(slice(8))
    smudged = Dice("smudges").below(3, 8, SLOTS) == 0
    things, tints, boxes = labels(scenes, smudged, size)
    want_things, want_tints, want_boxes = expected_labels(scenes, smudged, size)
    # A cell exactly on a border may be rounded to either side.
    assert (things != want_things).float().mean() < 0.001
    assert (tints != want_tints).float().mean() < 0.001
    for (i, row, column), box in want_boxes.items():
        if things[i, row, column] == want_things[i, row, column]:
            assert boxes[i, :, row, column].tolist() == pytest.approx(box, abs=1e-4)
    # Every thing that is there has a cell of its own.
    for i in range(8):
        for s in range(SLOTS):
            if scenes.present[i, s] and not smudged[i, s]:
                assert (things[i] == scenes.thing[i, s]).any()
            elif not scenes.present[i, s]:
                assert not (things[i] == scenes.thing[i, s]).any()


def a_map(h=8, w=12):
    """A map where there is nothing anywhere, sure by 1."""
    chances = torch.zeros(len(NAMES) + 2, h, w)
    chances[NOTHING] = 1
    return chances, torch.zeros(len(TINTS) + 1, h, w), torch.zeros(3, h, w)


def put(chances, at, thing, sure, rest=NOTHING):
    row, column = at
    chances[:, row, column] = 0
    chances[thing, row, column], chances[rest, row, column] = sure, 1 - sure


def test_peaks_of_a_hand_made_map():
    chances, tints, boxes = a_map()
    put(chances, (2, 3), 7, 0.9)
    put(chances, (2, 4), 7, 0.8)  # the same thing, seen less surely
    put(chances, (6, 9), SMUDGE, 0.7)
    put(chances, (0, 0), 5, 0.45)  # more likely nothing
    tints[4, 2, 3] = 1
    boxes[:, 2, 3] = torch.tensor([0.25, -0.5, math.log(40 / 128)])
    boxes[:, 2, 4] = torch.tensor([-0.75, -0.5, math.log(40 / 128)])
    boxes[:, 6, 9] = torch.tensor([0.0, 0.0, math.log(32 / 128)])
    first, second = _peaks(chances, tints, boxes, 64)
    assert (first.thing, first.tint, first.sure) == (7, 4, pytest.approx(0.9))
    assert (first.x, first.y) == (pytest.approx(30 / 64), pytest.approx(16 / 64))
    assert first.size == pytest.approx(40 / 64)
    assert (second.thing, second.sure) == (SMUDGE, pytest.approx(0.7))
    assert (second.x, second.y) == (pytest.approx(76 / 64), pytest.approx(52 / 64))
    assert second.size == pytest.approx(32 / 64)


def test_nothing_has_no_peaks():
    assert _peaks(*a_map(), 64) == []


def test_things_side_by_side_are_two():
    """Half of a thing's side apart is one thing, and more is two."""
    for columns, expected in ((2, 1), (3, 2)):
        chances, tints, boxes = a_map()
        put(chances, (4, 2), 7, 0.9)
        put(chances, (4, 2 + columns), 8, 0.8)
        boxes[2] = math.log(40 / 128)
        found = _peaks(chances, tints, boxes, 64)
        assert [f.thing for f in found] == [7, 8][:expected]


def test_a_cell_between_two_things_counts_as_something():
    """Neither is likely, but it is unlikely that there is nothing."""
    chances, tints, boxes = a_map()
    put(chances, (1, 1), 3, 0.4, rest=9)
    chances[9, 1, 1], chances[NOTHING, 1, 1] = 0.3, 0.3
    (found,) = _peaks(chances, tints, boxes, 64)
    assert (found.thing, found.sure) == (3, pytest.approx(0.4))


def test_the_loss_is_least_for_right_answers():
    scenes = scenes_for(6, (1.0, 1.0), Dice("loss"))
    scenes = scenes.having(look=scenes.look * 0)
    smudged = torch.zeros(6, SLOTS, dtype=torch.bool)
    smudged[0, 0] = True
    unclear = torch.tensor([True, False, False, False, False, False])
    things, tints, boxes = labels(scenes, smudged, (64, 64))

    def answers(shift):
        def one_hot(index, count):
            right = ((index.clamp_min(0) + shift) % count)[:, None]
            shape = (len(index), count, *index.shape[1:])
            return torch.zeros(shape).scatter_(1, right, 20.0)

        ground = torch.where(unclear, UNCLEAR, scenes.ground)
        return lambda _: (
            one_hot(things, len(NAMES) + 2),
            one_hot(tints, len(TINTS) + 1),
            boxes + shift,
            one_hot(ground, len(GROUNDS) + 1),
            one_hot(scenes.look, len(LOOKS)),
        )

    drawn = torch.zeros(6, 3, 64, 64)
    assert float(loss_of(answers(0), drawn, scenes, smudged, unclear)) < 1e-3
    assert float(loss_of(answers(1), drawn, scenes, smudged, unclear)) > 60


def test_scenes_to_learn_from_are_orderly_and_some_are_empty():
    scenes = scenes_for(600, (1.0, 1.0), Dice("learn"))
    assert len(scenes) == 600
    assert scenes.orderly().all()
    assert 0 < (~scenes.present.any(1)).float().mean() < 0.12
    assert set(scenes.look.tolist()) == set(range(len(LOOKS)))


def test_spoilt_pictures_are_told_and_others_are_as_drawn():
    from fluxfire.spark.rendering import render

    scenes = scenes_for(60, (1.0, 1.0), Dice("spoil"))
    drawn, smudged, unclear = spoil(scenes, Dice("spoil", 1), 32)
    clean = render(scenes, 32)
    apart = (drawn - clean).abs().amax((1, 2, 3))
    told = (smudged & scenes.present).any(1) | unclear
    assert (apart[~told] < 1e-5).all()
    # A mixture with another ground of an empty scene is told by its ground.
    assert (apart[told] > 0.01).float().mean() > 0.9
    assert 0.2 < told.float().mean() < 0.7
    assert (smudged.all(1) >= unclear).all()


def test_varied_pictures_are_nearly_the_same():
    pictures = torch.rand(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    varied = vary(pictures, 3)
    assert varied.shape == pictures.shape
    assert varied.min() >= 0
    assert varied.max() <= 1
    assert 0.001 < (varied - pictures).abs().mean() < 0.08
