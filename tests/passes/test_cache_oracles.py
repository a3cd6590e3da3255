"""FirstBlockCache against the other implementations, at equal settings.

Each oracle runs on a class of its own, since ParaAttention and cache-dit patch the class of
the pipeline that they are given.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from diffusers import FirstBlockCacheConfig
from other_caches import STEPS, THRESHOLDS, own_class, theirs

import fluxfire
from fluxfire.errors import PlanError
from fluxfire.passes import FirstBlockCache
from fluxfire.testing import edit, tiny_kontext


def ours(threshold, **settings):
    """Return hits and pixels with the others' settings: no limits, and the last residual held."""
    limits = {"warmup_steps": 0, "tail_steps": 0, "max_consecutive_hits": None, "of_steps": None}
    cache = FirstBlockCache(threshold, predict="hold", **(limits | settings))
    pipe = fluxfire.optimize(tiny_kontext(), [cache])
    made = edit(pipe, steps=STEPS)
    hits = [d.step for d in fluxfire.report(pipe).runs[-1].decisions if d.hits[0]]
    return made, hits


@contextmanager
def in_a_cache_context(pipe):
    """Enter diffusers' cache context, as FluxPipeline does and the Kontext pipeline does not."""
    transformer, plain = pipe.transformer, pipe.transformer.forward

    def forward(*args, **kwargs):
        with transformer.cache_context("cond"):
            return plain(*args, **kwargs)

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_diffusers_first_block_cache(threshold):
    pipe = own_class()
    with in_a_cache_context(pipe):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        made, hits = theirs(pipe)
    expected, ours_hit = ours(threshold)
    assert hits == ours_hit
    assert np.abs(made - expected).max() < 1e-6


def test_diffusers_first_block_cache_needs_that_context():
    """Shows why the oracle needs its repair. If this fails, diffusers has been fixed."""
    pipe = own_class()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="No context is set|No cache context"):
        edit(pipe)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_para_attention(para_attn, threshold):
    made, hits = theirs(para_attn(own_class(), residual_diff_threshold=threshold))
    expected, ours_hit = ours(threshold)
    assert hits == ours_hit
    assert np.abs(made - expected).max() < 1e-6


def test_para_attention_compares_a_batch_as_one(para_attn):
    """The difference: it measures the whole batch at once, where ours gives each sample its own.

    Its decisions follow from the first block's outputs over all samples; ours differ among them.
    """
    prompts = ["make it night", "x", "a very long instruction, with many words in it", "?!"]
    pipe, added = own_class(), []
    pipe.transformer.transformer_blocks[0].register_forward_hook(
        lambda _, inputs, out: added.append(out[1] - inputs[0])
    )
    _, hits = theirs(para_attn(pipe, residual_diff_threshold=0.31), prompt=prompts)
    last, expected = added[0], []
    for step, now in enumerate(added[1:], start=1):
        if float((now - last).abs().mean() / last.abs().mean()) < 0.31:
            expected.append(step)
        else:
            last = now
    assert hits == expected
    cache = FirstBlockCache(
        0.31, predict="hold", warmup_steps=0, tail_steps=0, max_consecutive_hits=None
    )
    own = fluxfire.optimize(tiny_kontext(), [cache])
    edit(own, steps=STEPS, prompt=prompts)
    decisions = [d.hits for d in fluxfire.report(own).runs[-1].decisions]
    assert any(len(set(samples)) > 1 for samples in decisions)


def test_a_pipeline_that_para_attention_took_is_refused(para_attn):
    pipe = para_attn(own_class(), residual_diff_threshold=0.1)
    with pytest.raises(PlanError, match="another library's cache"):
        fluxfire.optimize(pipe, [FirstBlockCache()])


@pytest.fixture
def cache_dit():
    return pytest.importorskip("cache_dit")


@pytest.mark.parametrize(("warmup", "cap"), [(0, None), (1, None), (4, None), (4, 2), (0, 1)])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_cache_dit(cache_dit, threshold, warmup, cap):
    pipe = own_class()
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=warmup,
        max_continuous_cached_steps=-1 if cap is None else cap,
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    made, hits = theirs(pipe)
    expected, ours_hit = ours(threshold, warmup_steps=warmup, max_consecutive_hits=cap)
    assert hits == ours_hit
    assert np.abs(made - expected).max() < 1e-6


def test_a_pipeline_that_cache_dit_took_is_refused(cache_dit):
    pipe = own_class()
    cache_dit.enable_cache(pipe)
    with pytest.raises(PlanError, match="another library's cache"):
        fluxfire.optimize(pipe, [FirstBlockCache()])
    cache_dit.disable_cache(pipe)
    fluxfire.optimize(pipe, [FirstBlockCache()])
