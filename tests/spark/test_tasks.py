"""Examples and scores."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfire.spark import checking, language
from fluxfire.spark.checking import Verdict
from fluxfire.spark.edits import KINDS, SIDES
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import SEVERAL
from fluxfire.spark.scenes import SLOTS
from fluxfire.spark.scoring import Score, as_table, psnr, score, summarise
from fluxfire.spark.tasks import ALL_KINDS, SIZES, drawings, examples

SMALL = (16, 16)
"""Instructions do not depend on the size."""


def test_examples_are_seeded_and_alternate():
    first, again = (examples(n=16, seed=3, size=SMALL) for _ in range(2))
    assert [t.instruction for t in first] == [t.instruction for t in again]
    assert all(np.array_equal(a.target, b.target) for a, b in zip(first, again, strict=True))
    assert [t.kind for t in first] == [*ALL_KINDS] * 2
    other = examples(n=8, seed=4, size=SMALL)
    assert [t.instruction for t in other] != [t.instruction for t in first[:8]]
    assert [t.instruction for t in examples(n=5, seed=3, size=SMALL)] == [
        t.instruction for t in first[:5]
    ]
    assert {t.kind for t in examples(n=4, kinds=("move", "add"), size=SMALL)} == {"move", "add"}


def test_the_splits_are_drawn_apart():
    train, test = (examples(split=split, n=16, size=SMALL) for split in ("train", "test"))
    assert not {t.instruction for t in train} & {t.instruction for t in test}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"split": "dev"}, "must be train or test"),
        ({"n": 0}, "must be positive"),
        ({"size": (100, 128)}, "multiples of 16"),
        ({"size": (0, 128)}, "multiples of 16"),
        ({"kinds": ("paint",)}, "there are no kinds"),
    ],
)
def test_nonsense_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        examples(**wrong)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_have_the_size_asked_for_and_show_the_scenes(size):
    (task,) = examples(n=1, size=size, kinds=("move",))
    assert task.source.size == task.target.size == size
    for picture, scenes in ((task.source, task.batch.source), (task.target, task.scenes)):
        drawn = render(scenes, min(size))[0]
        assert (checking.as_tensor(picture) - drawn).abs().max() <= 0.5 / 255 + 1e-6
    assert task.scenes is task.batch.target
    (drawing,) = drawings(n=1, size=size)
    assert drawing.target.size == size


def all_sayings(task, split):
    """What an instruction may be in a split's wordings, in lower case and British."""
    some = [language.wordings(edit, split) for edit in task.batch.edits]
    return {task.batch.instruction(0, chosen).lower() for chosen in itertools.product(*some)}


def plain(said):
    said = said.lower().rstrip(".").removeprefix("please ").removesuffix(" please")
    return re.sub(r"\bgray\b", "grey", re.sub(r"\bcolor\b", "colour", said))


def unseen(task):
    return bool(task.batch.novel[0]) or plain(task.instruction) not in all_sayings(task, "train")


@pytest.mark.parametrize(
    "kind",
    ALL_KINDS,
)
def test_test_examples_are_what_training_never_shows(kind):
    tasks = examples(split="test", n=12, size=SMALL, kinds=(kind,))
    assert all(unseen(task) for task in tasks)
    both = [all_sayings(t, "train") | all_sayings(t, "test") for t in tasks]
    assert all(plain(t.instruction) in said for t, said in zip(tasks, both, strict=True))
    novel = sum(bool(t.batch.novel[0]) for t in tasks)
    assert novel == 0 if kind == "look" else 3 <= novel <= 11  # two thirds


def test_train_examples_are_what_training_shows():
    for task in examples(split="train", n=16, size=SMALL):
        assert not task.batch.novel[0]
        assert plain(task.instruction) in all_sayings(task, "train")


def test_a_third_of_the_test_split_has_known_words_in_a_new_combination():
    tasks = examples(split="test", n=30, size=SMALL, kinds=("remove", "recolour"))
    known = [plain(t.instruction) in all_sayings(t, "train") for t in tasks]
    assert 3 <= sum(known) <= 18
    assert all(bool(t.batch.novel[0]) for t, k in zip(tasks, known, strict=True) if k)


def test_the_check_knows_the_sides_asked_for():
    tasks = examples(n=16, size=SMALL, kinds=("move", "add", SEVERAL, "remove"))
    seen = set()
    for task in tasks:
        asked = task._task()
        assert asked.source is task.batch.source
        assert asked.target is task.batch.target
        expected = [len(SIDES)] * SLOTS
        for choice in task.batch.choices:
            if "side" in choice:
                expected[int(choice["subject"][0])] = int(choice["side"][0])
        assert list(asked.side) == expected
        seen |= set(asked.side)
        for slot, side in enumerate(asked.side):
            if side < len(SIDES):
                assert SIDES[side].split()[-1] in task.instruction
                x, y = float(task.scenes.x[0, slot]), float(task.scenes.y[0, slot])
                assert (x, 1 - x, y, 1 - y)[side] < 0.42
    assert len(seen) > 3


def test_drawings_are_seeded_and_have_no_source():
    first, again = (drawings(n=12, seed=3, size=SMALL) for _ in range(2))
    assert [t.instruction for t in first] == [t.instruction for t in again]
    assert len(first) == 12
    assert {t.instruction for t in first}.isdisjoint(
        t.instruction for t in drawings(n=12, seed=4, size=SMALL)
    )
    assert first[0]._task().source is None
    assert set(first[0]._task().side) == {len(SIDES)}
    for size in ((16, 16), (32, 16), (16, 32)):
        assert len(drawings(n=12, size=size)) == 12


def test_scores_are_shares_by_kind():
    def scored(kind, *faults):
        return Score(kind, "", Verdict(faults, 0.0, 1.0, 1.0), Image.new("RGB", (1, 1)))

    scores = [scored("move"), scored("move", "it is blue"), scored("add")]
    assert [s.passed for s in scores] == [True, False, True]
    found = summarise(scores)
    assert [(s.kind, s.n, s.success) for s in found] == [
        ("move", 2, 0.5),
        ("add", 1, 1.0),
        ("all", 3, pytest.approx(2 / 3)),
    ]
    lines = as_table(found).splitlines()
    assert [line.split()[0] for line in lines if line.split()[0] in {*KINDS, "all"}] == [
        "move", "add", "all",
    ]  # fmt: skip
    assert "66.7%" in lines[-1]


def test_psnr_by_arithmetic():
    assert psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20)
    assert psnr(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)) == pytest.approx(100)


class Echo:
    """A pipeline that gives back what it gets."""

    def __init__(self):
        self.calls = []

    def __call__(self, *, image, prompt, generator, **call):
        self.calls.append(
            {"prompt": prompt, "seeds": [g.initial_seed() for g in generator], **call}
        )
        size = call["width"], call["height"]
        pictures = image or [Image.new("RGB", size)] * len(prompt)
        return type("Out", (), {"images": pictures})()


@pytest.mark.usefixtures("untrained_weights")
def test_scoring_edits_each_example_with_its_own_noise():
    tasks = examples(n=5, size=(32, 16), kinds=("remove", "move"))
    pipe = Echo()
    scores = score(pipe, tasks, steps=3, seed=10, batch=2, guidance_scale=2.0)
    assert [s.kind for s in scores] == ["remove", "move"] * 2 + ["remove"]
    assert [s.instruction for s in scores] == [t.instruction for t in tasks]
    assert all(np.array_equal(s.image, t.source) for s, t in zip(scores, tasks, strict=True))
    assert [c["seeds"] for c in pipe.calls] == [[10, 11], [12, 13], [14]]
    for call in pipe.calls:
        assert (call["width"], call["height"], call["_auto_resize"]) == (32, 16, False)
        assert (call["num_inference_steps"], call["guidance_scale"]) == (3, 2.0)
    assert {s.kind for s in score(pipe, drawings(n=2, size=SMALL))} == {"from words"}


def test_one_score_is_not_of_several_sizes():
    with pytest.raises(ValueError, match="several sizes"):
        score(None, [*drawings(n=1, size=SMALL), *drawings(n=1, size=(48, 32))])
