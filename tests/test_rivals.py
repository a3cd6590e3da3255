"""Other libraries in the harness: they do what they do by themselves, and leave nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfire.bench import Contender, Example, Workload, measure
from fluxfire.bench.contenders import apart
from fluxfire.bench.rivals import CacheDit, MagCache, TorchaoFloat8, decides_by_content, installed
from fluxfire.kontext import blocks
from fluxfire.testing import edit, tiny_kontext

LOAD = Workload(name="tiny", size=(32, 32), steps=12, auto_resize=False, text_tokens=24)
EXAMPLE = Example("make it blue", Image.new("RGB", (32, 32), "red"))


def run(pipe, rival):
    (row,) = measure(pipe, [Contender("it", (), "rival", rival=rival)], [LOAD], [EXAMPLE], rounds=2)
    assert row.error is None
    assert {row.to_dict()[name] for name in ("step", "hits", "weights_gb_per_second")} == {None}
    return np.asarray(row.pictures[0])


def test_a_pipeline_apart_shares_weights_and_nothing_else(pipe, reference):
    other = apart(pipe)
    assert type(other) is type(pipe)
    assert np.array_equal(edit(other), reference)
    mine, its = (dict(p.transformer.named_parameters()) for p in (pipe, other))
    assert all(its[name] is mine[name] for name in mine)
    assert not set(blocks(pipe.transformer)) & set(blocks(other.transformer))
    blocks(other.transformer)[0].attn.to_q = torch.nn.Identity()
    assert np.array_equal(edit(pipe), reference)


def test_cache_dit_is_what_it_is_by_itself(pipe, reference):
    cache_dit = pytest.importorskip("cache_dit")
    from cache_dit.caching.block_adapters.adapters import flux_adapter

    made = run(pipe, CacheDit(threshold=0.33))
    assert np.array_equal(edit(pipe), reference)
    alone = apart(tiny_kontext())
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.33, max_warmup_steps=0
    )
    alone.__class__ = type("FluxAlone", (type(alone),), {})  # it patches the class
    cache_dit.enable_cache(flux_adapter(alone), cache_config=config)
    assert np.array_equal(made, np.asarray(LOAD.run(alone, EXAMPLE)))
    assert not np.array_equal(made, np.asarray(LOAD.run(pipe, EXAMPLE)))


def test_mag_cache_is_calibrated_and_begins_anew(pipe, reference, capsys):
    """Its step counter outlives a run of two steps, were it not reset."""
    pytest.importorskip("diffusers", "0.36.0")
    rival = MagCache(threshold=10.0)
    made = run(pipe, rival)
    assert np.array_equal(edit(pipe), reference)
    assert "Calibration" not in capsys.readouterr().out
    assert len(rival._ratios[LOAD]) == LOAD.steps
    from diffusers import MagCacheConfig

    alone = tiny_kontext()
    alone.transformer.enable_cache(
        MagCacheConfig(
            threshold=10.0, num_inference_steps=LOAD.steps, mag_ratios=rival._ratios[LOAD]
        )
    )
    assert np.array_equal(made, np.asarray(LOAD.run(alone, EXAMPLE)))
    assert not np.array_equal(made, np.asarray(LOAD.run(pipe, EXAMPLE)))


def test_each_rival_runs_and_leaves_the_pipeline_plain():
    """Uncompiled: what compiling does is tested elsewhere."""
    pipe = tiny_kontext(double_blocks=4, single_blocks=8)  # cache-dit computes eight by default
    reference = edit(pipe)
    rivals = [c for c in installed() if not c.name.endswith("compiled")]
    if not rivals:
        pytest.skip("no rival is installed")
    rows = measure(pipe, rivals, [LOAD], [EXAMPLE], rounds=1)
    assert {row.contender.name: row.error for row in rows} == {c.name: None for c in rivals}
    assert np.array_equal(edit(pipe), reference)


def test_only_caches_decide_by_content():
    assert not decides_by_content(Contender("torchao", rival=TorchaoFloat8()))
    caches = [c for c in installed() if not isinstance(c.rival, TorchaoFloat8)]
    assert all(map(decides_by_content, caches))
