"""Properties of the planner, over thousands of random lists of passes that are only data."""

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
from fluxfire.planner import malformed, order, problems, spelled, workable
from fluxfire.protocol import BOUNDARIES, STAGES

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
    assert (problems(passes) == []) == (rising and unique(passes))


@thorough
@given(lists)
def test_order_is_a_stable_sort_by_stage_or_an_error(passes):
    if not unique(passes):
        with pytest.raises(PlanError):
            order(passes)
        return
    result = order(passes)
    assert sorted(map(id, result)) == sorted(map(id, passes))
    assert problems(result) == []
    for stage in STAGES:
        same = [p for p in passes if p.stage == stage]
        assert [p for p in result if p.stage == stage] == same
    assert order(result) == result


@thorough
@given(lists)
def test_the_workable_rest_is_valid_and_leaves_out_only_what_clashes(passes):
    kept = workable(passes)
    assert problems(kept) == []
    identities = {id(p) for p in kept}
    for p in passes:
        if id(p) not in identities:
            assert any(k.name == p.name or (p.slot and k.slot == p.slot) for k in kept)


@given(fakes)
def test_a_pass_is_spelled_without_what_is_the_default(fake):
    assert eval(spelled(fake)) == fake
    assert ("slot" in spelled(fake)) == (fake.slot is not None)
    assert spelled(Fake()) == "Fake()"


@thorough
@given(lists)
def test_an_order_error_names_both_passes_and_gives_the_boundarys_reason(passes):
    said = "\n".join(problems(passes))
    highest = None
    for p in passes:
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
    said = problems(passes, applied=applied)
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
    assert words in malformed(candidate)


@pytest.mark.parametrize("name", fluxfire.__all__)
def test_public_names_are_those_of_their_homes(name):
    found = getattr(fluxfire, name)
    assert getattr(found, "__name__", "").rpartition(".")[2] == name
    assert name in dir(fluxfire)


def test_planner_and_package_load_nothing_heavy():
    code = (
        "import sys, fluxfire, fluxfire.planner, fluxfire.protocol, fluxfire.cli;"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
