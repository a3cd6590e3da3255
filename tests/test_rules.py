"""Which lists of passes make sense: properties, over thousands of lists that are only data."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxfire
from doubles import Fake
from fluxfire.errors import PlanError
from fluxfire.planning.resolve import order
from fluxfire.planning.rules import (
    conflict_messages,
    find_conflicts,
    misspelt_members,
    reasons_to_leave_out,
    sort_by_stage,
    why_not_a_pass,
)
from fluxfire.protocol import BOUNDARIES, STAGES
from fluxfire.text import spell

fakes = st.builds(
    Fake,
    name=st.sampled_from("abcdefgh"),
    stage=st.sampled_from(STAGES),
    slot=st.sampled_from([None, None, "cache", "engine"]),
)
lists = st.lists(fakes, max_size=7)
thorough = settings(max_examples=2000, deadline=None)


def rank(pass_):
    return STAGES.index(pass_.stage)


def unique(passes):
    names = [p.name for p in passes]
    slots = [p.slot for p in passes if p.slot is not None]
    return len({*names}) == len(names) and len({*slots}) == len(slots)


@thorough
@given(lists)
def test_a_list_is_fine_exactly_when_stages_rise_and_nothing_is_there_twice(passes):
    rising = all(rank(a) <= rank(b) for a, b in pairwise(passes))
    assert (conflict_messages(passes) == []) == (rising and unique(passes))


@thorough
@given(lists)
def test_order_is_a_stable_sort_by_stage_or_an_error(passes):
    if not unique(passes):
        with pytest.raises(PlanError):
            order(passes)
        return
    result = order(passes)
    assert sorted(map(id, result)) == sorted(map(id, passes))
    assert conflict_messages(result) == []
    for stage in STAGES:
        same = [p for p in passes if p.stage == stage]
        assert [p for p in result if p.stage == stage] == same
    assert order(result) == result


@thorough
@given(lists)
def test_the_workable_rest_is_valid_and_leaves_out_only_what_clashes(passes):
    whys = reasons_to_leave_out(passes)
    kept = [p for p, why in zip(passes, whys, strict=True) if why is None]
    assert conflict_messages(sort_by_stage(kept)) == []
    for p, why in zip(passes, whys, strict=True):
        if why is not None:
            clashing = [k for k in kept if k.name == p.name or (p.slot and k.slot == p.slot)]
            assert clashing
            assert any(k.name in why for k in clashing)


@thorough
@given(lists, fakes)
def test_what_is_applied_already_keeps_its_name_slot_and_stage(passes, applied):
    for p, why in zip(passes, reasons_to_leave_out(passes, [applied]), strict=True):
        taken = p.name == applied.name or (p.slot and p.slot == applied.slot)
        if taken or rank(p) < rank(applied):
            assert why is not None


@thorough
@given(lists)
def test_a_fault_is_told_of_the_pass_that_it_names_and_once(passes):
    found = list(find_conflicts(passes))
    assert all(said.startswith(f"{passes[index].name} ") for index, said in found)
    assert conflict_messages(passes) == list(dict.fromkeys(said for _, said in found))


def test_the_reason_of_a_stage_fits_whatever_follows_it():
    """A cache before Compile alone has nothing to do with saved artifacts' keys."""
    (said,) = conflict_messages(
        [Fake(name="compile", stage="compile"), Fake(name="c", stage="caching")]
    )
    assert said == (
        "c (stage caching) must come before compile (stage compile): caches decide which graphs "
        "there are to save and to compile"
    )


def test_order_takes_names_and_says_what_is_wrong():
    made = fluxfire.order(["compile", "qkv-fusion", Fake(name="x", stage="caching")])
    assert [p.name for p in made] == ["qkv-fusion", "x", "compile"]
    with pytest.raises(PlanError, match="no pass 'qkv'; there are attention"):
        fluxfire.order(["qkv"])
    with pytest.raises(PlanError, match=r"order\(\) takes a list of passes, not 'compile'"):
        fluxfire.order("compile")


@given(fakes)
def test_a_pass_is_spelled_without_what_is_the_default(fake):
    assert eval(spell(fake)) == fake
    assert ("slot" in spell(fake)) == (fake.slot is not None)
    assert spell(Fake()) == "Fake()"


@thorough
@given(lists)
def test_an_order_error_names_both_passes_and_gives_the_boundarys_reason(passes):
    said = "\n".join(conflict_messages(passes))
    highest, names = None, set()
    for p in passes:
        if p.name in names:
            continue  # told of already, since one of the two must go
        names.add(p.name)
        if highest is not None and rank(p) < rank(highest):
            sentence = (
                f"{p.name} (stage {p.stage}) must come before {highest.name} "
                f"(stage {highest.stage}): {BOUNDARIES[p.stage]}"
            )
            assert sentence in said
        else:
            highest = p


@thorough
@given(lists, st.integers(0, 7))
def test_what_is_already_applied_is_told_apart(passes, applied):
    said = conflict_messages(passes, applied=applied)
    names = [p.name for p in passes]
    for i, name in enumerate(names):
        first = names.index(name)
        if first < i and first < applied:
            assert any(s.startswith(f"{name} is already applied") for s in said)


class Half:
    name = "half"
    stage = "weights"


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (Fake, "Fake is a class; pass an instance, Fake()"),
        (Half(), "has no slot, exactness, check(), apply()"),
        (Fake(stage="later"), "stage 'later'; the stages are environment, weights"),
        (Fake(exactness="roughly"), "exactness 'roughly'; it must be one of bitwise"),
        (Fake(name=""), "a pass's name is a non-empty string"),
        (3, "3 is not a pass"),
    ],
)
def test_what_is_no_pass_is_told_why(candidate, words):
    assert words in why_not_a_pass(candidate)


def a_pass(**members):
    """A pass that has these members, too."""
    return type("Odd", (Fake,), members)()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"provides": "lora"}, "has provides 'lora'; it must be a set of traits"),
        ({"provides": None}, "has provides None; it must be a set of traits"),
        ({"provides": iter(["lora"])}, "it must be a set of traits"),
        ({"provides": [["lora"]]}, "it must be a set of traits"),
        ({"provides": {"loras"}}, "provides 'loras', which is no trait; there are compiled"),
        ({"tunable": "stage"}, "has tunable 'stage'; it must be a set of names of its fields"),
        ({"tunable": True}, "has tunable True; it must be a set of names"),
        ({"tunable": iter(["slot"])}, "it must be a set of names"),
        ({"tunable": {"slots"}}, "has tunable 'slots', which is no field of it; its fields are na"),
        ({"tunable": {"slot"}, "off": 3}, "has an off that cannot be called without arguments"),
        ({"tunable": {"slot"}, "off": lambda self, x: self}, "has an off that cannot be called"),
        ({"after_warmup": lambda self: None}, "after_warmup that cannot be called with one arg"),
        ({"after_warmup": lambda self, tx, x: None}, "cannot be called with one argument, tx"),
        ({"after_warmup": lambda self, *, tx: None}, "cannot be called with one argument, tx"),
        ({"after_warmup": True}, "cannot be called with one argument, tx"),
    ],
)
def test_an_optional_member_that_is_wrong_is_told(members, words):
    assert words in why_not_a_pass(a_pass(**members))


@pytest.mark.parametrize(
    "members",
    [
        {"provides": ["lora"]},
        {"provides": frozenset()},
        {"tunable": ("slot", "stage")},
        {"tunable": {"slot"}, "off": lambda self, x=1: self},
        {"off": True},  # of its own, since it is not tunable
        {"after_warmup": lambda self, tx, x=1: None},
        {"after_warmup": lambda self, *arguments: None},
        {"after_warmup": print},
        {"after_warmup": None},
        {"tuneable": {"slot"}},  # `check_pass` alone reports it
    ],
)
def test_an_optional_member_that_is_right_is_none_of_the_reasons(members):
    assert why_not_a_pass(a_pass(**members)) is None


def test_a_tunable_pass_without_fields_is_told_so():
    class Plain:
        name, stage, slot, exactness = "plain", "weights", None, "bitwise"
        tunable = frozenset({"name"})
        check = apply = Fake.check

    assert "no field of it; its fields are none" in why_not_a_pass(Plain())


def test_a_missing_member_that_is_misspelt_is_guessed():
    class Slip:
        name, stage, slots, exactnes = "slip", "weights", None, "bitwise"
        check = apply = Fake.check

    said = why_not_a_pass(Slip())
    assert said.endswith(
        "it has no slot, exactness; did you mean `slot`, `exactness`? You wrote `slots`, `exactnes`"
    )


@pytest.mark.parametrize(
    ("attribute", "member"),
    [
        ("provide", "provides"),
        ("provided", "provides"),
        ("tuneable", "tunable"),
        ("tunabel", "tunable"),
        ("after_warm_up", "after_warmup"),
        ("afterwarmup", "after_warmup"),
        ("exactnes", "exactness"),
        ("stages", "stage"),
    ],
)
def test_a_misspelt_member_is_found(attribute, member):
    assert misspelt_members(a_pass(**{attribute: 1})) == {attribute: member}
    # Beside the member itself it is another thing.
    assert misspelt_members(a_pass(**{attribute: 1, member: 1})) == {}


@pytest.mark.parametrize(
    "attribute", ["_provide", "storage", "state", "warmup_steps", "offset", "change", "trainable"]
)
def test_a_name_that_is_not_so_near_is_no_misspelt_member(attribute):
    assert misspelt_members(a_pass(**{attribute: 1})) == {}


@pytest.mark.parametrize("name", fluxfire.__all__)
def test_public_names_are_those_of_their_homes(name):
    found = getattr(fluxfire, name)
    assert getattr(found, "__name__", "").rpartition(".")[2] == name
    assert name in dir(fluxfire)


def test_rules_and_package_load_nothing_heavy():
    code = (
        "import sys, fluxfire, fluxfire.planning.rules, fluxfire.planning.suggest, fluxfire.cli;"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
