"""Presets are lists that can be applied, and those set by tune are what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

import fluxfire
from fluxfire import presets, recipes
from fluxfire.bench import load_result
from fluxfire.passes import FirstBlockCache
from fluxfire.testing import tiny_kontext

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


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


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_tuned_presets_have_the_cache_that_was_found(name):
    file = RESULTS / f"tuned_{name}.json"
    found = [p for p in recipes.read(file) if p.stage == "caching"]
    assert [p for p in presets.named(name) if p.stage == "caching"] == found
    tuned = load_result(file)["tuned"]
    assert tuned["confirmed"]["verdict"] == "within"
    assert tuned["confirmed"]["n"] >= 256
    near, budget = tuned["confirmed"]["psnr"], tuned["budget"]
    assert near["worst"] >= (budget["min_psnr"] or 0)
    assert near["mean"] >= (budget["mean_psnr"] or 0)
    lost = tuned["plain"]["success"] - tuned["confirmed"]["success"]
    assert lost <= budget["max_lost"] + 1e-9


def test_faster_presets_hit_more():
    thresholds = [
        next(p.threshold for p in presets.named(n) if isinstance(p, FirstBlockCache))
        for n in ("balanced", "fast")
    ]
    assert thresholds == sorted(thresholds)
