"""What edits change, how they are asked for, and what training never sees."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.spark import language
from fluxfire.spark.edits import FREE, KEEP, KINDS, LOCAL, LOOK_WORDINGS, SIDES, WHERE, WHOLE, is_at
from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import SEVERAL, draw_edits, is_held_out, join_edits, kinds_of
from fluxfire.spark.scenes import LOOKS, SLOTS, Dice
from fluxfire.spark.tasks import examples
from fluxfire.spark.things import NAMES, TINTS, distinct

SQUARE, WIDE, TALL = (1.0, 1.0), (160 / 96, 1.0), (1.0, 144 / 112)
ANYWHERE = len(SIDES)
# The fields that each kind may change: of the thing it is about, or of the whole scene.
CHANGES = {
    "add": {"x", "y", "size", "turn", "flip", "shade", "present"},
    "remove": {"present"},
    "replace": {"thing", "tint", "x", "y", "size", "turn", "flip", "shade"},
    "recolour": {"tint", "shade"},
    "move": {"x", "y"},
    "ground": {"ground", "seed"},
    "look": {"look", "weather"},
}
PAIRS = [
    pair for a, b in itertools.product(LOCAL, WHOLE) for pair in ((a, b), (b, a))
]  # of several instructions in one
kinds = pytest.mark.parametrize("kind", KINDS)
pairs = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def drawn(*names, n=40, extent=SQUARE, seed=0, **how):
    edits = tuple(KINDS[name] for name in names)
    return draw_edits(edits, n, extent, Dice("test", *names, seed), **how)


def changed_fields(before, after):
    after = after.tensors()
    return {name for name, t in before.tensors().items() if not torch.equal(t, after[name])}


def untouched(batch, choice):
    """(N, SLOTS): every slot but the one that an instruction is about."""
    others = torch.ones_like(batch.source.present)
    if "subject" in choice:
        others.scatter_(1, choice["subject"][:, None], False)
    return others


def is_novel(name, scenes, choice):
    """The rule, in plain arithmetic, for every result: things from 0 and kinds from 1."""
    rows = range(len(scenes))
    if name == "ground":
        return [
            any(
                (int(scenes.thing[r, s]) + 7 * int(choice["ground"][r])) % 10 == 0
                for s in range(SLOTS)
                if scenes.present[r, s]
            )
            for r in rows
        ]
    if name == "look":
        return [False for _ in rows]
    number = 1 + list(KINDS).index(name)
    return [(3 * number + int(scenes.thing[r, int(choice["subject"][r])])) % 10 == 0 for r in rows]


def any_novel(batch):
    each = [
        is_novel(edit.name, batch.target, choice)
        for edit, choice in zip(batch.edits, batch.choices, strict=True)
    ]
    return [any(row) for row in zip(*each, strict=True)]


@kinds
def test_an_edit_changes_what_it_is_about_and_nothing_else(kind):
    batch = drawn(kind)
    assert changed_fields(batch.source, batch.target) == CHANGES[kind]
    (choice,) = batch.choices
    others = untouched(batch, choice)
    before, after = batch.source.tensors(), batch.target.tensors()
    for name in CHANGES[kind]:
        if before[name].ndim == 2:
            assert torch.equal(before[name][others], after[name][others]), name


@kinds
def test_an_edit_is_seen(kind):
    batch = drawn(kind, n=12)
    apart = (render(batch.source, 48) - render(batch.target, 48)).abs().amax((1, 2, 3))
    assert (apart > 0.05).all()


@kinds
@pytest.mark.parametrize("extent", [SQUARE, WIDE, TALL], ids=["square", "wide", "tall"])
def test_both_pictures_are_orderly_and_draws_are_seeded(kind, extent):
    batch, again = drawn(kind, extent=extent), drawn(kind, extent=extent)
    assert len(batch) == len(batch.source) == len(batch.target) == 40
    assert batch.source.orderly().all()
    assert batch.target.orderly().all()
    assert changed_fields(batch.target, again.target) == set()
    assert all(torch.equal(t, again.choices[0][name]) for name, t in batch.choices[0].items())
    assert changed_fields(batch.target, drawn(kind, extent=extent, seed=1).target)


@kinds
def test_one_instruction_has_many_results(kind):
    batch = drawn(kind)
    edit, (choice,) = batch.edits[0], batch.choices
    results = [edit.apply(batch.source, choice, Dice("again", i)) for i in range(2)]
    free = changed_fields(*results)
    # What the instruction says is the same in all of its results; a removal leaves nothing open.
    said = {
        "add": {"present"}, "remove": {"present"}, "replace": {"thing", "tint"},
        "recolour": {"tint"}, "move": set(), "ground": {"ground"}, "look": {"look"},
    }  # fmt: skip
    assert free == CHANGES[kind] - said[kind]


def test_additions_fill_the_free_slot():
    batch = drawn("add", n=200)
    (choice,) = batch.choices
    assert (choice["subject"] == FREE).all()
    assert not batch.source.present[:, FREE].any()
    assert batch.target.present[:, FREE].all()
    assert set(choice["side"].tolist()) == {*range(len(SIDES)), ANYWHERE}
    assert 80 < (choice["side"] == ANYWHERE).sum() < 170


def test_removals_remove_what_was_there():
    batch = drawn("remove", n=200)
    slot = batch.choices[0]["subject"]
    assert batch.source.of("present", slot).all()
    assert not batch.target.of("present", slot).any()
    assert set(slot.tolist()) == {0, 1, 2}


def test_replacements_put_the_free_slots_thing_about_where_one_was():
    batch = drawn("replace", n=200)
    slot = batch.choices[0]["subject"]
    assert batch.source.of("present", slot).all()
    for name in ("thing", "tint"):
        assert torch.equal(batch.target.of(name, slot), getattr(batch.source, name)[:, FREE])
    assert (batch.target.of("thing", slot) != batch.source.of("thing", slot)).all()
    for axis in ("x", "y"):
        off = (batch.target.of(axis, slot) - batch.source.of(axis, slot)).abs()
        assert 0.02 < off.max() < 0.0301


def test_recolourings_give_another_colour_that_is_seen():
    batch = drawn("recolour", n=200)
    (choice,) = batch.choices
    slot = choice["subject"]
    assert torch.equal(batch.target.of("tint", slot), choice["tint"])
    assert (choice["tint"] > 0).all()
    assert (choice["tint"] != batch.source.of("tint", slot)).all()
    assert distinct()[batch.source.of("thing", slot), choice["tint"]].all()
    assert (batch.source.look != LOOKS.index("grey")).all()
    assert set(choice["tint"].tolist()) == set(range(1, len(TINTS) + 1))


@pytest.mark.parametrize("extent", [SQUARE, WIDE, TALL], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("kind", ["add", "move"])
def test_things_come_to_the_side_that_is_named(kind, extent):
    batch = drawn(kind, n=150, extent=extent)
    (choice,) = batch.choices
    seen = set()
    for row, side in enumerate(choice["side"].tolist()):
        slot = int(choice["subject"][row])
        along = float(batch.target.x[row, slot]) / extent[0]
        down = float(batch.target.y[row, slot]) / extent[1]
        left_over = {
            "on the left": along, "on the right": 1 - along, "at the top": down,
            "at the bottom": 1 - down,
        }  # fmt: skip
        if side < len(SIDES):
            assert left_over[SIDES[side]] < 0.42, SIDES[side]
        seen.add(side)
    assert seen >= set(range(len(SIDES)))


def test_moves_are_long_and_not_to_where_the_thing_is():
    batch = drawn("move", n=200)
    (choice,) = batch.choices
    assert (choice["side"] < len(SIDES)).all()
    for row, slot in enumerate(choice["subject"].tolist()):
        was = float(batch.source.x[row, slot]), float(batch.source.y[row, slot])
        now = float(batch.target.x[row, slot]), float(batch.target.y[row, slot])
        assert ((was[0] - now[0]) ** 2 + (was[1] - now[1]) ** 2) ** 0.5 >= 0.25 - 1e-6
        gap = (was[0], 1 - was[0], was[1], 1 - was[1])[int(choice["side"][row])]
        assert gap >= 0.42 - 1e-6


def test_sides_by_hand():
    x, y = (
        torch.tensor([0.1, 0.9, 0.5, 0.5, 0.5, 1.0]),
        torch.tensor([0.5, 0.5, 0.1, 0.9, 0.5, 0.5]),
    )
    hand = [
        [True, False, False, False, False, False],
        [False, True, False, False, False, True],
        [False, False, True, False, False, False],
        [False, False, False, True, False, False],
        [True] * 6,
    ]
    for side, expected in enumerate(hand):
        assert is_at(torch.full((6,), side), x, y, SQUARE).tolist() == expected
    # In a picture twice as wide, 0.9 is left of the middle and 1.0 is in it.
    wide = is_at(torch.zeros(6, dtype=torch.int64), x, y, (2.0, 1.0))
    assert wide.tolist() == [True, False, True, True, True, False]


def test_grounds_and_looks_are_others_and_the_ones_asked_for():
    batch = drawn("ground", n=300)
    asked = batch.choices[0]["ground"]
    assert torch.equal(batch.target.ground, asked)
    assert (batch.source.ground != asked).all()
    assert set(asked.tolist()) == set(range(len(GROUNDS)))
    batch = drawn("look", n=200)
    asked = batch.choices[0]["look"]
    assert torch.equal(batch.target.look, asked)
    assert (batch.source.look == 0).all()
    assert set(asked.tolist()) == set(range(1, len(LOOKS)))


@kinds
def test_held_out_combinations_are_kept_apart(kind):
    known, novel = drawn(kind, n=200, novel=False), drawn(kind, n=30, novel=True)
    assert not any(any_novel(known))
    assert not known.novel.any()
    if kind != "look":  # which has nothing to combine
        assert all(any_novel(novel))
        assert novel.novel.all()
    mixed = drawn(kind, n=200)
    assert mixed.novel.tolist() == any_novel(mixed)


@pairs
def test_held_out_combinations_are_kept_apart_in_several_instructions(pair):
    known, novel = drawn(*pair, n=80, novel=False), drawn(*pair, n=20, novel=True)
    assert not any(any_novel(known))
    assert not known.novel.any()
    assert all(any_novel(novel))


def test_examples_of_the_train_split_hold_no_held_out_combination():
    tasks = examples(split="train", n=48, seed=2, size=(32, 32))
    assert {t.kind for t in tasks} == {*KINDS, SEVERAL}
    assert not any(any(any_novel(t.batch)) for t in tasks)


def test_training_sees_every_thing_but_not_in_every_kind():
    thing = torch.arange(len(NAMES))
    out = torch.stack([is_held_out(kind, thing) for kind in range(len(KINDS) + 1)])
    assert ((out.float().mean(1) - 0.1).abs() < 0.01).all()
    assert not out.all(0).any()
    assert out.any(0).float().mean() > 0.5


def test_no_thing_comes_to_a_held_out_ground_in_training():
    """Whatever its slot, and whatever else is asked in the same instruction."""
    batches = [drawn(*names, n=200, novel=False) for names in (("ground",), *PAIRS)]
    seen = 0
    for batch in batches:
        if "ground" not in [edit.name for edit in batch.edits]:
            continue
        pair = batch.target.thing + 7 * batch.target.ground[:, None]
        seen += int(((pair % 10 == 0) & batch.target.present).sum())
    assert seen == 0


def words_of(*wordings):
    return {*re.findall(r"[a-z]+", re.sub(r"\{.*?\}", " ", " ".join(wordings)))}


def all_known():
    """Every word of the wordings that training uses, fields included."""
    looks = [w for known, _ in LOOK_WORDINGS.values() for w in known]
    plain = [w for edit in KINDS.values() for w in edit.known]
    return words_of(*plain, *looks, *KEEP, *SIDES, *itertools.chain(*WHERE.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_novel_wordings_are_new_but_of_known_words(kind):
    edit = KINDS[kind]
    assert edit.known
    assert edit.novel
    assert not set(edit.known) & set(edit.novel)
    for wording in edit.novel:
        assert words_of(wording) <= all_known(), wording


@pytest.mark.parametrize("look", LOOKS[1:])
def test_novel_wordings_of_looks_are_new_but_of_known_words(look):
    known, novel = LOOK_WORDINGS[look]
    assert not set(known) & set(novel)
    assert novel
    for wording in novel:
        assert words_of(wording) <= all_known(), wording
    others = {w for name, pair in LOOK_WORDINGS.items() if name != look for w in sum(pair, ())}
    assert not others & {*known, *novel}


def say_again(batch, row):
    """Both splits' instructions for one edit: two sets."""
    return tuple(
        {batch.instruction(row, (w,)) for w in language.wordings(batch.edits[0], split)}
        for split in ("train", "test")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_novel_wording_never_comes_out_as_a_known_one(kind):
    batch = drawn(kind, n=30)
    for row in range(30):
        known, novel = say_again(batch, row)
        assert not known & novel


@kinds
def test_no_two_things_or_tasks_are_asked_for_by_one_instruction(kind):
    """An instruction says what is asked: two that ask otherwise never read the same."""
    batch = drawn(kind, n=150)
    asked = {}
    for row in range(150):
        slot = batch.choices[0].get("subject")
        it = None if slot is None else int(batch.source.thing[row, int(slot[row])])
        new = int(batch.source.thing[row, FREE]), int(batch.source.tint[row, FREE])
        rest = [int(t[row]) for name, t in batch.choices[0].items() if name != "subject"]
        what = (it, *rest, *(new if kind in ("add", "replace") else ()))
        for known_or_novel in say_again(batch, row):
            for said in known_or_novel:
                assert asked.setdefault(said, what) == what, said


@given(seed=st.integers(0, 2**31), kind=st.sampled_from([*KINDS, SEVERAL]))
def test_instructions_are_within_the_language_and_name_one_thing(seed, kind):
    dice = Dice(seed)
    edits = kinds_of(kind, dice)
    batch = draw_edits(edits, 1, SQUARE, dice)
    for split in ("train", "test"):
        for chosen in itertools.product(*(language.wordings(e, split)[:3] for e in edits)):
            said = language.phrase(batch.instruction(0, chosen), dice)
            assert language.unknown(said) == ()
            assert "{" not in said
            assert "  " not in said
            assert said == said.strip()
    for edit, scenes, choice in zip(edits, batch.between, batch.choices, strict=True):
        if "subject" in choice and edit.name != "add":
            it = edit.fields(scenes, choice, 0)["it"]
            meant = [s for s in range(SLOTS) if NAMES[int(scenes.thing[0, s])] == it]
            assert meant == [int(choice["subject"][0])]
            assert scenes.present[0, meant].all()


def test_instructions_name_what_is_asked():
    batch = drawn("add", n=60)
    for row, side in enumerate(batch.choices[0]["side"].tolist()):
        said = batch.instruction(row, ("add {new} {place}",))
        thing, tint = int(batch.target.thing[row, FREE]), int(batch.target.tint[row, FREE])
        colour = f"{list(TINTS)[tint - 1]} " if tint else ""
        end = "" if side == ANYWHERE else f" {SIDES[side]}"
        assert re.fullmatch(f"add an? {colour}{NAMES[thing]}{end}", said)
    batch = drawn("move", n=20)
    for row, side in enumerate(batch.choices[0]["side"].tolist()):
        name = NAMES[int(batch.source.thing[row, int(batch.choices[0]["subject"][row])])]
        side_said = ("to the left", "to the right", "to the top", "to the bottom")[side]
        assert batch.instruction(row, ("move the {it} {to}",)) == f"move the {name} {side_said}"
    batch = drawn("recolour", n=20)
    for row, tint in enumerate(batch.choices[0]["tint"].tolist()):
        said = batch.instruction(row, ("make the {it} {colour}",))
        assert said.endswith(f" {list(TINTS)[tint - 1]}")
    batch = drawn("ground", n=40)
    for row, ground in enumerate(batch.choices[0]["ground"].tolist()):
        where, what = WHERE[list(GROUNDS)[ground]]
        assert batch.instruction(row, ("put it {where}",)) == f"put it {where}"
        assert batch.instruction(row, ("use {what}",)) == f"use {what}"
    batch = drawn("look", n=40)
    for row, look in enumerate(batch.choices[0]["look"].tolist()):
        assert batch.instruction(row, ("{known1}",)) == LOOK_WORDINGS[LOOKS[look]][0][1]
        assert batch.instruction(row, ("{novel0}",)) == LOOK_WORDINGS[LOOKS[look]][1][0]


@pairs
def test_several_instructions_are_done_one_after_the_other(pair):
    batch = drawn(*pair, n=20)
    assert len(batch.between) == 2
    assert changed_fields(batch.source, batch.between[0]) == set()
    middle = batch.between[1]
    assert changed_fields(batch.source, middle) == CHANGES[pair[0]]
    assert changed_fields(middle, batch.target) == CHANGES[pair[1]]
    assert batch.source.orderly().all()
    assert batch.target.orderly().all()
    local = batch.choices[0 if pair[0] in LOCAL else 1]
    others = untouched(batch, local)
    for name in CHANGES[pair[0]] | CHANGES[pair[1]]:
        before, after = batch.source.tensors()[name], batch.target.tensors()[name]
        if before.ndim == 2:
            assert torch.equal(before[others], after[others]), name
    wordings = tuple(edit.known[0] for edit in batch.edits)
    for row in range(20):
        first, second = (
            " ".join(w.format(**e.fields(s, c, row)).split())
            for w, e, s, c in zip(wordings, batch.edits, batch.between, batch.choices, strict=True)
        )
        assert batch.instruction(row, wordings) == f"{first} and {second}"


def test_several_is_one_local_and_one_whole_edit_in_any_order():
    seen = {tuple(e.name for e in kinds_of(SEVERAL, Dice("pairs", i))) for i in range(300)}
    assert seen == set(PAIRS)
    assert [e.name for e in kinds_of("move", Dice(0))] == ["move"]


def test_a_colour_is_asked_for_only_where_it_will_be_seen():
    """Not of a picture that the same instruction makes black and white."""
    looks = drawn("recolour", "look", n=200).target.look.tolist()
    assert LOOKS.index("grey") not in looks


def test_batches_are_taken_and_joined():
    batch = drawn("replace", "look", n=9)
    again = join_edits([batch.take(slice(4)), batch.take(torch.arange(4, 9))])
    assert len(again) == 9
    for one, other in zip(
        (batch.source, batch.target, *batch.between),
        (again.source, again.target, *again.between),
        strict=True,
    ):
        assert changed_fields(one, other) == set()
    for one, other in zip(batch.choices, again.choices, strict=True):
        assert {name: t.tolist() for name, t in one.items()} == {
            name: t.tolist() for name, t in other.items()
        }
    assert torch.equal(batch.novel, again.novel)
    words = ("turn the {it} into {new}", "{known0}")
    assert batch.instruction(6, words) == again.instruction(6, words)
