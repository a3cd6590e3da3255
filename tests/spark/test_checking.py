"""The checker, on pictures whose verdict is known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fluxfire.spark import checking, examples
from fluxfire.spark.edits import KINDS
from fluxfire.spark.rendering import blur, render
from fluxfire.spark.sampling import changes_enough
from fluxfire.spark.scenes import Dice


@pytest.fixture(scope="module")
def tasks():
    return examples(split="test", n=240, seed=7)


def target(task):
    return checking.as_tensor(task.target)


def passing(tasks, controls):
    """Share of controls that pass; those that do not apply are None."""
    verdicts = [
        task.check(picture)
        for task, picture in zip(tasks, controls, strict=True)
        if picture is not None
    ]
    assert len(verdicts) >= 20
    return sum(verdicts) / len(verdicts)


def test_exact_targets_pass_in_every_form(tasks):
    assert passing(tasks, [t.target for t in tasks]) == 1
    assert passing(tasks, [np.asarray(t.target) for t in tasks]) == 1
    assert passing(tasks, [render(t.batch.target)[0] for t in tasks]) == 1


def test_faint_noise_and_softness_pass(tasks):
    noise = torch.Generator().manual_seed(0)

    def worn(picture):
        soft = blur(picture[None], 0.55)[0]
        return (soft + 0.015 * torch.randn(soft.shape, generator=noise)).clamp(0, 1)

    assert passing(tasks, [worn(target(t)) for t in tasks]) == 1


def test_the_unedited_source_never_passes(tasks):
    assert passing(tasks, [t.source for t in tasks]) == 0


def test_another_instructions_target_never_passes(tasks):
    def other(task, index):
        """Another edit of the same source, or None if it comes to the same picture."""
        dice = Dice("other", index)
        edit = list(KINDS.values())[int(dice.below(len(KINDS), 1))]
        edited = edit.apply(task.batch.source, edit.draw(task.batch.source, dice))
        if not (edited.orderly() & changes_enough(task.batch.source, edited, edit)).all():
            return None
        picture = render(edited)[0]
        return picture if (picture - target(task)).abs().max() > 0.05 else None

    assert passing(tasks, [other(t, i) for i, t in enumerate(tasks)]) == 0


def test_blur_to_24_db_does_not_pass(tasks):
    def blurred(picture):
        low, high = 0.3, 12.0
        for _ in range(8):
            middle = (low + high) / 2
            soft = blur(picture[None], middle)[0]
            error = float((soft - picture).square().mean())
            low, high = (middle, high) if -10 * math.log10(error) > 24 else (low, middle)
        return soft

    assert passing(tasks, [blurred(target(t)) for t in tasks]) <= 0.05


def test_the_right_colour_on_the_wrong_shape_does_not_pass(tasks):
    def wrong(task):
        batch = task.batch
        if task.kind != "recolour":
            return None
        others = batch.source.present.clone()
        others[0, batch.choice["subject"]] = False
        subject = Dice(0).which(others)
        return render(batch.edit.apply(batch.source, {**batch.choice, "subject": subject}))[0]

    assert passing(tasks, [wrong(t) for t in tasks]) <= 0.05


def test_a_tenth_of_the_picture_off_does_not_pass(tasks):
    way = torch.Generator().manual_seed(1)

    def misplaced(task):
        batch = task.batch
        if "subject" not in batch.choice or task.kind == "remove":
            return None
        subject = batch.choice["subject"]
        angle = 2 * torch.pi * torch.rand(1, generator=way)
        moved = batch.target.put(
            subject,
            x=batch.target.of("x", subject) + 0.1 * angle.cos(),
            y=batch.target.of("y", subject) + 0.1 * angle.sin(),
        )
        return render(moved)[0]

    assert passing(tasks, [misplaced(t) for t in tasks]) <= 0.05


def test_a_ghost_left_behind_does_not_pass(tasks):
    def ghosted(task):
        batch = task.batch
        if task.kind not in ("move", "nudge", "swap", "remove"):
            return None
        gone = render(batch.source.put(batch.choice["subject"], present=False))[0]
        ghost = checking.as_tensor(task.source) - gone
        bare = (target(task) - gone).abs().mean(0) < 0.02  # where nothing else now lies
        picture = (target(task) + 0.5 * ghost * bare).clamp(0, 1)
        seen = ((picture - target(task)).abs().amax(0) > 0.1).sum()
        return picture if seen >= 80 else None

    assert passing(tasks, [ghosted(t) for t in tasks]) <= 0.05


def test_pictures_that_cannot_be_judged_are_refused(tasks):
    with pytest.raises(ValueError, match="not an RGB picture"):
        tasks[0].check(np.zeros((128, 128), dtype=np.uint8))
    with pytest.raises(ValueError, match="64x64, but this example's are 128x128"):
        tasks[0].check(torch.zeros(3, 64, 64))


def test_examples_are_seeded_and_refuse_nonsense():
    first, again = examples(n=24, seed=3), examples(n=24, seed=3)
    assert [t.instruction for t in first] == [t.instruction for t in again]
    assert all(np.array_equal(a.target, b.target) for a, b in zip(first, again, strict=True))
    assert {t.kind for t in first} == set(KINDS)
    assert [t.instruction for t in examples(n=24, seed=4)] != [t.instruction for t in first]
    assert examples(n=1, size=(160, 96))[0].source.size == (160, 96)
    for wrong, words in (
        ({"split": "dev"}, "must be train or test"),
        ({"n": 0}, "must be positive"),
        ({"size": (100, 128)}, "multiples of 16"),
        ({"kinds": ("paint",)}, "there are no kinds"),
    ):
        with pytest.raises(ValueError, match=words):
            examples(**wrong)


def test_test_examples_are_what_training_never_shows():
    known = {w for e in KINDS.values() for w in e.known}
    assert known
    for task in examples(split="test", n=120):
        fresh_wording = not any(_matches(w, task) for w in KINDS[task.kind].known)
        assert bool(task.batch.novel[0]) or fresh_wording
    for task in examples(split="train", n=120):
        assert not task.batch.novel[0]
        assert any(_matches(w, task) for w in KINDS[task.kind].known)


def _matches(wording, task):
    said = task.instruction.lower().rstrip(".").removeprefix("please ").removesuffix(" please")
    for american, british in (("color", "colour"), ("gray", "grey"), ("center", "centre")):
        said = said.replace(american, british)
    return said == task.batch.instruction(0, wording)
