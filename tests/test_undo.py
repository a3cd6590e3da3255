"""Whatever happens, the pipeline ends bit for bit where it began."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluxfire
from doubles import HalfTheTokens, Listen, ScaleTemb, SkipBlock
from fluxfire.applying import apply_passes
from fluxfire.errors import PassError, PlanError, RestoreError
from fluxfire.passes import Compile, InductorPatch, MemoryLayout, QKVFusion
from fluxfire.planning.rules import sort_by_stage
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from fluxfire.testing.conformance import FaultyTransaction
from fluxfire.testing.promises import InjectedFailureError
from own_passes import own_passes
from thinned import ALL, half

PASSES = [*own_passes(), Listen(), ScaleTemb(), SkipBlock(), HalfTheTokens()]


def test_orders_that_are_both_allowed_make_one_picture():
    """Whatever two passes of one stage make of each other's work, nothing is lost."""
    pipe, tried = tiny_kontext(), 0
    exact = [p for p in PASSES if p.exactness != "lossy" or p.name == "float8"]
    for pair in itertools.combinations(exact, 2):
        orders = [list(pair), list(pair)[::-1]]
        if pair[0].stage == pair[1].stage and all(fluxfire.plan(pipe, o).ok for o in orders):
            tried += 1
            made = []
            for passes in orders:
                with fluxfire.optimized(pipe, passes):
                    made.append(edit(pipe))
            assert np.abs(made[0] - made[1]).max() < 1e-5, orders[0]
    assert tried >= 3


@pytest.fixture(scope="module")
def shared():
    """One pipeline for all examples: each must leave it as it was."""
    pipe = tiny_kontext()
    picture = edit(pipe, steps=1)
    facts = pipe, picture, fingerprint(pipe)
    return lambda: facts  # hypothesis prints arguments, and printing a pipeline changes it


@pytest.mark.parametrize("passes", [[QKVFusion()], [MemoryLayout()], [QKVFusion(), MemoryLayout()]])
def test_a_pipeline_built_in_inference_mode(passes):
    with torch.inference_mode():
        pipe = tiny_kontext()
    picture, before = edit(pipe), fingerprint(pipe)
    with fluxfire.optimized(pipe, passes):
        assert np.abs(edit(pipe) - picture).max() < 1e-5
    assert differences(before, fingerprint(pipe)) == []
    assert np.array_equal(edit(pipe), picture)


@settings(
    max_examples=150 if ALL else 50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    passes=st.lists(st.sampled_from(PASSES), max_size=5, unique_by=lambda p: p.name),
    in_order=st.booleans(),
    fail_at=st.one_of(st.none(), st.integers(0, 40)),
    generate=st.booleans(),
)
def test_random_lists_with_failures_at_random_edits(shared, passes, in_order, fail_at, generate):
    pipe, picture, before = shared()
    entered = len(Listen.entered)
    if in_order:
        passes = sort_by_stage(passes)
    allowed = fluxfire.plan(pipe, passes).ok
    transaction = functools.partial(FaultyTransaction, fail_at=fail_at)
    try:
        apply_passes(pipe, passes, transaction)
        if generate:
            edit(pipe, steps=1)
    except PlanError:
        assert not allowed
    except PassError as error:
        assert isinstance(error.__cause__, InjectedFailureError)
    else:
        fluxfire.restore(pipe)
    assert differences(before, fingerprint(pipe)) == []
    assert np.array_equal(edit(pipe, steps=1), picture)
    assert len(Listen.entered) == entered


def test_restore_twice_and_on_a_plain_pipeline(pipe, reference):
    assert fluxfire.restore(pipe) is pipe
    fluxfire.optimize(pipe, [QKVFusion()])
    assert fluxfire.restore(fluxfire.restore(pipe)) is pipe
    assert np.array_equal(edit(pipe), reference)


def test_restore_after_a_generation_that_raised(pipe, reference):
    fluxfire.optimize(pipe, [QKVFusion(), MemoryLayout(), SkipBlock()])

    def fail(*_):
        raise InjectedFailureError

    with pytest.raises(InjectedFailureError):
        edit(pipe, callback_on_step_end=fail)
    assert fluxfire.report(pipe).runs[-1].error.startswith("InjectedFailureError")
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)


def test_an_interrupt_rolls_back_and_stays_an_interrupt(pipe, reference):
    class Interrupted(ScaleTemb):
        def apply(self, tx):
            super().apply(tx)
            raise KeyboardInterrupt

    edit(pipe)
    before = fingerprint(pipe)
    with pytest.raises(KeyboardInterrupt):
        fluxfire.optimize(pipe, [QKVFusion(), Interrupted()])
    assert differences(before, fingerprint(pipe)) == []
    assert np.array_equal(edit(pipe), reference)


def test_an_inverse_that_fails_does_not_stop_the_others(pipe, reference):
    class Broken(ScaleTemb):
        def apply(self, tx):
            tx.on_undo(lambda: 1 / 0)
            return super().apply(tx)

    fluxfire.optimize(pipe, [QKVFusion(), Broken()])
    with pytest.raises(RestoreError, match="1 edits could not be undone") as caught:
        fluxfire.restore(pipe)
    assert isinstance(caught.value.failures[0], ZeroDivisionError)
    assert np.array_equal(edit(pipe), reference)
    assert fluxfire.report(pipe).passes == ()


def test_optimized_is_undone_at_the_end_of_the_block(pipe, reference):
    with pytest.raises(InjectedFailureError), fluxfire.optimized(pipe, [ScaleTemb()]):
        assert not np.array_equal(edit(pipe), reference)
        raise InjectedFailureError
    assert np.array_equal(edit(pipe), reference)


COMPILED = [
    [Compile()],
    [InductorPatch(), QKVFusion(), Compile()],
    [MemoryLayout(), SkipBlock(), HalfTheTokens(), Compile()],
]


@pytest.mark.slow
@pytest.mark.parametrize("passes", half(COMPILED, 1), ids=lambda p: "+".join(x.name for x in p))
def test_compiled_lists_with_a_failure_at_each_third_edit(shared, passes):
    pipe, picture, before = shared()
    made = []
    apply_passes(pipe, passes, lambda *a: made.append(FaultyTransaction(*a)) or made[0])
    edit(pipe, steps=1)
    fluxfire.restore(pipe)
    for fail_at in range(0, made[0].edits, 3):
        with pytest.raises(PassError):
            apply_passes(pipe, passes, functools.partial(FaultyTransaction, fail_at=fail_at))
        assert differences(before, fingerprint(pipe)) == []
    assert np.array_equal(edit(pipe, steps=1), picture)


def test_a_setting_that_is_a_set_has_no_order(pipe, monkeypatch):
    from torch._dynamo import config

    names = ["repro_level", "repro_after", "constant_functions", "one_more"]
    monkeypatch.setattr(config, "_save_config_ignore", {*names})
    before = fingerprint(pipe)
    # The same elements after others that were dropped: CPython may list them differently.
    for extra in range(1, 60):
        refilled = {*map(str, range(extra)), *reversed(names)}
        refilled.difference_update(map(str, range(extra)))
        config._save_config_ignore = refilled
        assert differences(before, fingerprint(pipe)) == []
    config._save_config_ignore = {*names[1:]}
    assert differences(before, fingerprint(pipe)) != []
