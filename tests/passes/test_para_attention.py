"""ParaAttention, compared with para-attn itself, which is repaired as in test_cache_oracles."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from other_caches import STEPS, THRESHOLDS, own_class, theirs

import fluxfire
from fluxfire.passes import Compile, FirstBlockCache, ParaAttention
from fluxfire.testing import check_pass, edit, tiny_kontext

needs_para_attn = pytest.mark.skipif(
    importlib.util.find_spec("para_attn") is None, reason="needs para-attn"
)


def ours(pass_, **call):
    pipe = fluxfire.optimize(tiny_kontext(), [pass_])
    made = edit(pipe, steps=STEPS, **call)
    return made, fluxfire.report(pipe).runs[-1].decisions


@needs_para_attn
@pytest.mark.parametrize(
    "pass_", [ParaAttention(), ParaAttention(0), ParaAttention(0.3, taylorseer=True)]
)
def test_it_conforms(pass_):
    check_pass(pass_)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}),
        ({"warmup_steps": 4}, {"warmup_steps": 4}),
        ({"downsample_factor": 3}, {"downsample_factor": 3}),
        (
            {"enable_taylorseer": True, "taylorseer_kwargs": {"n_derivatives": 1}},
            {"taylorseer": True, "derivatives": 1},
        ),
    ],
)
def test_pixels_and_hits_are_para_attentions(para_attn, threshold, options, settings):
    made, hits = theirs(para_attn(own_class(), residual_diff_threshold=threshold, **options))
    expected, decisions = ours(ParaAttention(threshold, **settings))
    assert [d.step for d in decisions if d.hits[0]] == hits
    assert np.array_equal(made, expected)


@pytest.mark.parametrize("alter", [None, 1e9])
def test_true_cfg_is_its_alternating_cache(para_attn, alter):
    cfg = {"negative_prompt": "dull colours", "true_cfg_scale": 2.0}
    pipe = para_attn(
        own_class(),
        residual_diff_threshold=0.33,
        enable_alter_cache=True,
        alter_residual_diff_threshold=alter,
    )
    made = edit(pipe, steps=STEPS, **cfg)
    expected, decisions = ours(ParaAttention(0.33, alter_threshold=alter), **cfg)
    assert np.array_equal(made, expected)
    assert {d.branch for d in decisions} == {"cond", "uncond"}
    # Without true CFG in the call, the same pass runs as para-attn's plain cache does.
    made = edit(para_attn(own_class(), residual_diff_threshold=0.33), steps=STEPS)
    assert np.array_equal(made, ours(ParaAttention(0.33, alter_threshold=alter))[0])


@needs_para_attn
def test_other_pipelines_never_notice():
    plain, pipe = tiny_kontext(), tiny_kontext()
    expected = edit(plain)
    fluxfire.optimize(pipe, [ParaAttention(1e9)])
    edit(pipe)
    assert not hasattr(type(plain), "_is_cached")
    assert np.array_equal(edit(plain), expected)
    from para_attn.first_block_cache import utils

    assert utils.get_current_cache_context() is None


@needs_para_attn
def test_it_shares_the_slot_and_takes_new_settings():
    both = fluxfire.plan(tiny_kontext(), [FirstBlockCache(), ParaAttention()])
    assert "both fill the slot 'block-cache'" in both.complaints()[0]
    pipe = fluxfire.optimize(tiny_kontext(), [ParaAttention(0)])
    with fluxfire.using(pipe, ParaAttention(1e9)):
        edit(pipe)
    assert fluxfire.report(pipe).runs[-1].hit_rate == pytest.approx(2 / 3)


def test_without_para_attn_it_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = fluxfire.plan(tiny_kontext(), [ParaAttention()]).complaints()
    assert 'para-attn is not installed; pip install "fluxfire[para-attn]"' in said[0]


@pytest.mark.parametrize("name", ["threshold", "alter_threshold"])
def test_settings_that_make_no_sense(name):
    with pytest.raises(ValueError, match=f"{name}=-1; it must be 0 or more"):
        ParaAttention(**{name: -1})


@needs_para_attn
@pytest.mark.slow
def test_it_runs_between_compiled_blocks():
    expected = ours(ParaAttention(0.33))[0]
    pipe = fluxfire.optimize(tiny_kontext(), [ParaAttention(0.33), Compile(fullgraph=True)])
    assert np.abs(edit(pipe, steps=STEPS) - expected).max() < 1e-4
    assert fluxfire.report(pipe).runs[-1].graph_breaks == 0
