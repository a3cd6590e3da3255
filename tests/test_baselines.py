"""Other libraries in the harness: they do what they do by themselves, and leave nothing."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfire.bench import Contender, Example, Workload, measure
from fluxfire.bench.baselines import (
    NAMES,
    CacheDit,
    MagCache,
    TorchaoFloat8,
    choose,
    decides_by_content,
    missing,
)
from fluxfire.bench.contenders import separate_copy
from fluxfire.errors import BenchError
from fluxfire.kontext import KONTEXT
from fluxfire.testing import edit, tiny_kontext

LOAD = Workload(name="tiny", size=(32, 32), steps=12, auto_resize=False, text_tokens=24)
EXAMPLE = Example("make it blue", Image.new("RGB", (32, 32), "red"))


def run(pipe, baseline):
    """Return the picture, and the steps that did not run all blocks."""
    it = Contender("it", (), "baseline", baseline=baseline)
    (row,) = measure(pipe, [it], [LOAD], [EXAMPLE], rounds=2, fewer_steps=False)
    assert row.error is None
    facts = row.to_dict()
    assert {facts[name] for name in ("step", "hits", "weights_gb_per_second")} == {None}
    return np.asarray(row.pictures[0]), facts["skipped"]


def test_a_pipeline_apart_shares_weights_and_nothing_else(pipe, reference):
    other = separate_copy(pipe)
    assert type(other) is type(pipe)
    assert np.array_equal(edit(other), reference)
    mine, its = (dict(p.transformer.named_parameters()) for p in (pipe, other))
    assert all(its[name] is mine[name] for name in mine)
    assert not set(KONTEXT.blocks(pipe.transformer)) & set(KONTEXT.blocks(other.transformer))
    KONTEXT.blocks(other.transformer)[0].attn.to_q = torch.nn.Identity()
    assert np.array_equal(edit(pipe), reference)


def test_cache_dit_is_what_it_is_by_itself(pipe, reference):
    cache_dit = pytest.importorskip("cache_dit")
    from cache_dit.caching.block_adapters.adapters import flux_adapter

    made, skipped = run(pipe, CacheDit(threshold=0.33, warmup_steps=0, max_consecutive_hits=-1))
    assert np.array_equal(edit(pipe), reference)
    alone = separate_copy(tiny_kontext())
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.33, max_warmup_steps=0
    )
    alone.__class__ = type("FluxAlone", (type(alone),), {})  # it patches the class
    cache_dit.enable_cache(flux_adapter(alone), cache_config=config)
    ran = []
    last = alone.transformer.single_transformer_blocks[-1].attn
    last.register_forward_hook(lambda *_: ran.append(1))
    assert np.array_equal(made, np.asarray(LOAD.run(alone, EXAMPLE)))
    assert 0 < skipped == LOAD.steps - len(ran)
    assert not np.array_equal(made, np.asarray(LOAD.run(pipe, EXAMPLE)))


def test_mag_cache_is_calibrated_and_begins_anew(pipe, reference, capsys):
    """Its step counter outlives a run of two steps, were it not reset."""
    pytest.importorskip("diffusers", "0.36.0")
    baseline = MagCache(threshold=10.0)
    made, skipped = run(pipe, baseline)
    assert skipped > 0
    assert np.array_equal(edit(pipe), reference)
    assert "Calibration" not in capsys.readouterr().out
    assert len(baseline._ratios[LOAD]) == LOAD.steps
    from diffusers import MagCacheConfig

    alone = tiny_kontext()
    alone.transformer.enable_cache(
        MagCacheConfig(
            threshold=10.0, num_inference_steps=LOAD.steps, mag_ratios=baseline._ratios[LOAD]
        )
    )
    assert np.array_equal(made, np.asarray(LOAD.run(alone, EXAMPLE)))
    assert not np.array_equal(made, np.asarray(LOAD.run(pipe, EXAMPLE)))


def test_each_baseline_runs_and_leaves_the_pipeline_plain():
    """Uncompiled: what compiling does is tested elsewhere."""
    pipe = tiny_kontext(double_blocks=4, single_blocks=8)
    reference = edit(pipe)
    baselines = [c for c in choose(steps=LOAD.steps) if not c.name.endswith("compiled")]
    if not baselines:
        pytest.skip("no other library is installed")
    rows = measure(pipe, baselines, [LOAD], [EXAMPLE], rounds=1, fewer_steps=False)
    assert {row.contender.name: row.error for row in rows} == {c.name: None for c in baselines}
    assert np.array_equal(edit(pipe), reference)


def test_a_baseline_stands_beside_plain_with_as_many_steps(pipe):
    """Written as the documentation says, without any of our passes."""

    class EveryThirdStep:
        """Computes every third step, and returns its output again in the two after it."""

        skips, compiles = True, False

        @contextmanager
        def applied(self, pipe):
            plain, self.step, self.kept = pipe.transformer.forward, 0, None

            def forward(*args, **call):
                if self.step % 3 == 0:
                    self.kept = plain(*args, **call)
                self.step += 1
                return self.kept

            pipe.transformer.forward = forward
            yield

        def begin(self, run, workload):
            self.step = 0

    third = Contender("third", (), "baseline", baseline=EveryThirdStep())
    rows = measure(pipe, [Contender("eager"), third], [LOAD], [EXAMPLE], rounds=1)
    assert [row.contender.name for row in rows] == ["eager", "third", "plain, 4 steps"]
    facts = rows[1].to_dict()
    assert (facts["work"], facts["skipped"]) == (4, 8)
    assert facts["beside_fewer_steps"]["contender"] == "plain, 4 steps"


def test_only_what_skips_decides_by_content():
    assert not decides_by_content(Contender("torchao", baseline=TorchaoFloat8()))
    caches = [c for c in choose() if not isinstance(c.baseline, TorchaoFloat8)]
    assert all(map(decides_by_content, caches))


def test_settings_follow_the_number_of_steps():
    pytest.importorskip("cache_dit")
    for steps, warmup in ((28, 8), (8, 3), (50, 15)):
        found = choose(["cache-dit"], steps=steps)
        assert {c.baseline.warmup_steps for c in found} == {warmup}
        assert all(f" W{warmup} " in c.name for c in found)


def test_baselines_are_chosen_by_name():
    assert choose([]) == []
    with pytest.raises(BenchError, match="no baseline 'cache-dot'.*did you mean 'cache-dit'"):
        choose(["cache-dot"])
    lacking = [name for name in NAMES if missing(name)]
    for name in lacking:
        with pytest.raises(BenchError, match=f"the baseline {name} needs "):
            choose([name])
