"""Presets are lists that can be applied, and stay within what others measured on the real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import fluxfire
from fluxfire import presets
from fluxfire.passes import FirstBlockCache
from fluxfire.testing import edit, tiny_kontext


@pytest.mark.parametrize("name", presets.NAMES)
def test_every_preset_is_a_tuple_in_order_that_applies(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preset = presets.named(name)
    assert isinstance(preset, tuple)
    assert fluxfire.order(preset) == list(preset)
    assert fluxfire.plan(tiny_kontext(), name).ok


def test_only_faithful_loses_nothing():
    lossy = {n for n in presets.NAMES if any(p.exactness == "lossy" for p in presets.named(n))}
    assert lossy == {"balanced", "fast", "article"}


def cache_of(name):
    (cache,) = [p for p in presets.named(name) if isinstance(p, FirstBlockCache)]
    return cache


BOUNDS = {
    "balanced": {"threshold": (0.0, 0.12), "warmup_steps": 8, "computed": 16, "in_a_row": 2},
    "fast": {"threshold": (0.0, 0.2), "warmup_steps": 6, "computed": 13, "in_a_row": 2},
}
"""What published results on the real FLUX.1 Kontext support, at 28 steps: cache-dit's F1B0 with 8
warm-up steps, 0.12 and 2 in a row (16 computed, 38.2 dB); with 0.15 (13 computed, 32.5 dB);
TeaCache (about 11 computed, 28.3 dB on average); RegionE and MagCache warm up for 6 steps, RegionE
computes the last 2."""


@pytest.mark.parametrize("name", BOUNDS)
def test_lossy_presets_stay_within_the_evidence(name):
    """A bolder setting is no default for the real model, whatever a small model allows."""
    cache, bounds = cache_of(name), BOUNDS[name]
    low, high = bounds["threshold"]
    assert low < cache.threshold <= high
    assert cache.predict == "damped"  # between holding and the line, which published results favour
    assert cache.distance == "all"
    assert cache.may_hit(28)[0] >= bounds["warmup_steps"]
    assert cache.may_hit(28)[-1] <= 25
    assert cache.max_consecutive_hits <= bounds["in_a_row"]
    for one in (cache, replace(cache, schedule=None)):
        assert 28 - one.most_hits(28) >= bounds["computed"]


@pytest.mark.parametrize("name", BOUNDS)
def test_no_picture_makes_a_preset_skip_more(name):
    """Run at distances that always hit: steps with a schedule, and others with the threshold."""
    own = cache_of(name)
    always = [replace(s, limits=dict.fromkeys(s.by_step)) for s in own.schedule]
    cache = replace(own, threshold=1e9, schedule=always)
    pipe = fluxfire.optimize(tiny_kontext(), [cache])
    computed = {}
    for steps in (20, 28, 35, 50):
        edit(pipe, steps=steps)
        computed[steps] = fluxfire.report(pipe).runs[-1].step_kinds.count("computed")
        assert computed[steps] == steps - cache.most_hits(steps)
    assert computed[28] >= BOUNDS[name]["computed"]
    shares = [n / steps for steps, n in computed.items()]
    assert max(shares) - min(shares) < 0.06  # all lengths behave alike, but for rounding up


def test_the_default_cache_is_that_of_balanced():
    """But for the schedules, which are for FLUX.1 Kontext's noise levels."""
    assert FirstBlockCache() == replace(cache_of("balanced"), schedule=None)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_picture_that_changes_much_has_more_steps_computed(name):
    cache = cache_of(name)
    few = [replace(s, limits=dict.fromkeys(s.by_step, 1e-9)) for s in cache.schedule]
    pipe = fluxfire.optimize(tiny_kontext(), [replace(cache, schedule=few)])
    edit(pipe, steps=28)
    assert fluxfire.report(pipe).runs[-1].hit_rate == 0


def test_fast_skips_more_than_balanced():
    for steps in (8, 20, 28, 50):
        assert cache_of("fast").most_hits(steps) >= cache_of("balanced").most_hits(steps)
    assert cache_of("fast").threshold > cache_of("balanced").threshold


@pytest.mark.parametrize("name", BOUNDS)
def test_docstrings_of_lossy_presets_state_their_evidence(name):
    """What they skip, what others measured, and that we measured no quality on the real model."""
    source = Path(presets.__file__).read_text()
    text = source[source.index(f"{name}: tuple") :].split('"""')[1]
    text = " ".join(text.split())
    assert f"skips up to {cache_of(name).most_hits(28)} of 28 steps" in text
    assert "dB" in text
    assert "We measured no quality on the real model" in text
