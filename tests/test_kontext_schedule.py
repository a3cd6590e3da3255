"""The presets' schedules: made from published statistics, within the published bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import kontext_schedule
from fluxfire import presets
from fluxfire.passes import FirstBlockCache

BOUNDS = {"balanced": (8, 2, 2), "fast": (6, 2, 2)}
"""First and last steps of 28 that are computed, and most skipped in a row."""


def cache_of(preset):
    (cache,) = (p for p in presets.named(preset) if isinstance(p, FirstBlockCache))
    return cache


@pytest.mark.parametrize("steps", [28, 20, 50])
@pytest.mark.parametrize("preset", list(BOUNDS))
def test_a_preset_has_the_schedule_that_the_statistics_give(preset, steps):
    warmup, tail, cap = BOUNDS[preset]
    skipped = tuple(cache_of(preset).limits(steps))
    known = kontext_schedule.schedules(steps, warmup=warmup, tail=tail, cap=cap)
    assert known[steps - len(skipped)] == skipped


@pytest.mark.parametrize("steps", [28, 20, 50])
@pytest.mark.parametrize("preset", list(BOUNDS))
def test_a_schedule_skips_no_more_than_its_threshold_may(preset, steps):
    warmup, tail, cap = BOUNDS[preset]
    cache = cache_of(preset)
    skipped = sorted(cache.limits(steps))
    assert skipped[0] >= warmup * steps / 28
    assert skipped[-1] < steps - tail * steps / 28
    longest = max(
        len(list(run))
        for hit, run in itertools.groupby(range(steps), lambda i: i in skipped)
        if hit
    )
    assert longest <= cap
    alone = FirstBlockCache(
        1e9, warmup_steps=warmup, tail_steps=tail, max_consecutive_hits=cap, of_steps=28
    )
    assert len(skipped) <= alone.most_hits(steps)
    assert all(0 < limit < 0.3 for limit in cache.limits(steps).values())


@pytest.mark.parametrize("steps", [28, 20, 50])
def test_the_noise_levels_are_those_of_diffusers(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(sigmas=even, mu=1.15)
    assert torch.allclose(kontext_schedule.sigmas(steps), scheduler.sigmas.double(), atol=1e-6)


def test_the_products_are_those_of_a_vector_that_grows_and_turns():
    """At 28 steps the lengths are the published ones, and so is the least change."""
    trace = kontext_schedule.trace(28, kontext_schedule.MAG_CACHE)
    lengths = trace.products.diagonal().sqrt()
    ratios = lengths[1:] / lengths[:-1]
    assert ratios.tolist() == pytest.approx(kontext_schedule.MAG_CACHE, abs=1e-6)
    apart = (
        trace.products.diagonal()[1:]
        + trace.products.diagonal()[:-1]
        - 2 * trace.products.diagonal(1)
    ).sqrt() / lengths[:-1]
    calm = (ratios - 1).abs() < 0.03
    assert apart[calm].tolist() == pytest.approx([0.037] * int(calm.sum()), rel=0.02)
