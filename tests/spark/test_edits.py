"""What edits change, how they are asked for, and what training never sees."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.spark import language
from fluxfire.spark.edits import FREE, KEEP, KINDS, PLACES, WAYS
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import draw_edits, is_held_out
from fluxfire.spark.scenes import CANONICAL_SIZE, COLOURS, GROUNDS, SHAPES, STYLES, Dice

SQUARE = (1.0, 1.0)
# The fields that each kind may change of the shape it is about.
CHANGES = {
    "recolour": {"colour", "tint"},
    "remove": {"present"},
    "add": {"x", "y", "size", "angle", "tint", "present"},
    "move": {"x", "y"},
    "nudge": {"x", "y"},
    "grow": {"size"},
    "shrink": {"size"},
    "swap": {"x", "y"},
    "ground": {"pattern", "tones", "period", "turn", "phase"},
    "outline": {"style"},
    "night": {"style"},
    "blur": {"style"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def drawn(kind, n=40, **how):
    return draw_edits(KINDS[kind], n, SQUARE, Dice("test", kind), **how)


@kinds
def test_an_edit_changes_what_it_is_about_and_nothing_else(kind):
    batch = drawn(kind)
    before, after = batch.source.tensors(), batch.target.tensors()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == CHANGES[kind]
    if "subject" in batch.choice:
        touched = {"subject", "other"} & batch.choice.keys()
        slots = torch.stack([batch.choice[name] for name in touched], 1)
        others = torch.ones_like(before["present"]).scatter(1, slots, False)
        for name in changed:
            assert torch.equal(before[name][others], after[name][others]), name
    apart = (render(batch.source, 64) - render(batch.target, 64)).abs().amax((1, 2, 3))
    assert (apart > 0.05).all()


@kinds
def test_both_pictures_are_orderly_and_draws_are_seeded(kind):
    batch, again = drawn(kind), drawn(kind)
    assert len(batch.source) == 40
    assert batch.source.orderly().all()
    assert batch.target.orderly().all()
    assert all(torch.equal(batch.choice[k], again.choice[k]) for k in batch.choice)


def test_targets_by_arithmetic():
    batch = drawn("recolour")
    s = batch.choice["subject"]
    assert (batch.target.of("colour", s) != batch.source.of("colour", s)).all()
    batch = drawn("grow")
    s = batch.choice["subject"]
    assert torch.allclose(batch.target.of("size", s), batch.source.of("size", s) * 1.5)
    batch = drawn("shrink")
    s = batch.choice["subject"]
    assert torch.allclose(batch.target.of("size", s) * 1.5, batch.source.of("size", s))
    batch = drawn("swap")
    one, two = batch.choice["subject"], batch.choice["other"]
    assert (one != two).all()
    for axis in ("x", "y"):
        assert torch.equal(batch.target.of(axis, one), batch.source.of(axis, two))
        assert torch.equal(batch.target.of(axis, two), batch.source.of(axis, one))
    batch = drawn("nudge")
    s = batch.choice["subject"]
    step = torch.tensor(list(WAYS.values()))[batch.choice["way"]]
    assert torch.allclose(batch.target.of("x", s) - batch.source.of("x", s), 0.25 * step[:, 0])
    batch = drawn("add")
    assert (batch.target.size[:, FREE] == CANONICAL_SIZE).all()
    for row, place in enumerate(batch.choice["place"].tolist()):
        along, down = list(PLACES.values())[place]
        assert float(batch.target.x[row, FREE]) == pytest.approx(0.25 + 0.5 * along)
        assert float(batch.target.y[row, FREE]) == pytest.approx(0.25 + 0.5 * down)


@kinds
def test_held_out_combinations_are_kept_apart(kind):
    index = list(KINDS).index(kind)
    known, novel = drawn(kind, 200, novel=False), drawn(kind, 30, novel=True)
    if "subject" not in known.choice:
        return  # nothing to combine
    for batch, expected in ((known, False), (novel, True)):
        out = torch.zeros(len(batch.novel), dtype=torch.bool)
        for role in {"subject", "other"} & batch.choice.keys():
            slot = batch.choice[role]
            out |= is_held_out(
                index, batch.target.of("shape", slot), batch.target.of("colour", slot)
            )
        assert (out == expected).all()
        assert (batch.novel == expected).all()


def test_training_sees_every_shape_and_colour_in_every_kind():
    shape, colour = torch.meshgrid(
        torch.arange(len(SHAPES)), torch.arange(len(COLOURS)), indexing="ij"
    )
    for kind in range(len(KINDS)):
        out = is_held_out(kind, shape, colour)
        assert (out.sum(1) == 1).all()  # one colour of each shape
        assert not out.all(0).any()


@kinds
def test_novel_wordings_are_new_but_of_known_words(kind):
    edit = KINDS[kind]
    assert not set(edit.known) & set(edit.novel)
    known = " ".join(w for e in (*KINDS.values(), KEEP) for w in e.known)
    known = {*re.findall(r"[a-z]+", re.sub(r"\{.*?\}", "", known))}
    for wording in edit.novel:
        assert {*re.findall(r"[a-z]+", re.sub(r"\{.*?\}", "", wording))} <= known, wording


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(list(KINDS)))
def test_instructions_are_within_the_language_and_name_one_shape(seed, kind):
    edit, dice = KINDS[kind], Dice(seed)
    batch = draw_edits(edit, 1, SQUARE, dice)
    for wording in (*edit.known, *edit.novel):
        said = language.phrase(batch.instruction(0, wording), dice)
        assert language.unknown(said) == ()
        assert "{" not in said
    if "subject" in batch.choice and kind != "add":
        it = edit.fields(batch.source, batch.choice, 0)["it"].split()
        here = batch.source.present[0]
        meant = here.clone()
        for word in it:
            if word in COLOURS:
                meant &= batch.source.colour[0] == list(COLOURS).index(word)
            elif word in SHAPES:
                meant &= batch.source.shape[0] == SHAPES.index(word)
        assert meant.nonzero().tolist() == [[int(batch.choice["subject"][0])]]


def test_grounds_and_styles_are_those_asked_for():
    batch = drawn("ground")
    for row, ground in enumerate(batch.choice["ground"].tolist()):
        named = list(GROUNDS)[ground]
        assert named in batch.instruction(row, "make the background {ground}")
        tones = torch.tensor(GROUNDS[named].tones)
        assert torch.equal(batch.target.tones[row], tones)
    for style in ("outline", "night", "blur"):
        assert (drawn(style).target.style == STYLES.index(style)).all()
