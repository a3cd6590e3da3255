"""ModulationTable: known and unknown time steps, table rows, and undo."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from peft import LoKrConfig

import fluxfire
from fluxfire.errors import FluxfireError
from fluxfire.passes import Compile, FirstBlockCache, FusedBlocks, ModulationTable
from fluxfire.passes import modulation_table as module
from fluxfire.runtime.generation import Listener
from fluxfire.testing import edit, tiny_kontext

CLOSE = 1e-5


def facts(pipe):
    return next(p.facts for p in fluxfire.report(pipe).passes if p.name == "modulation-table")


@pytest.mark.parametrize(
    ("call", "tables"),
    [
        ({}, 1),
        ({"num_inference_steps": 5, "guidance_scale": 1.0}, 1),
        ({"sigmas": [1.0, 0.8, 0.3]}, 1),
        ({"num_images_per_prompt": 2}, 1),
        ({"negative_prompt": "a boat", "true_cfg_scale": 2.0}, 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("before", [[], [FusedBlocks()]], ids=["alone", "behind FusedBlocks"])
def test_one_table_for_each_generation_and_branch(pipe, call, tables, before):
    plain = edit(pipe, **call)
    fluxfire.optimize(pipe, [*before, ModulationTable()])
    for number in (1, 2):
        assert np.abs(edit(pipe, **call) - plain).max() < CLOSE
        assert facts(pipe) == {"tables": number * tables, "without": 0}


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_begins_later(strength):
    pipe = tiny_kontext("inpaint")
    call = {"strength": strength, "num_inference_steps": 5}
    plain = edit(pipe, **call)
    fluxfire.optimize(pipe, [ModulationTable()])
    assert np.abs(edit(pipe, **call) - plain).max() < CLOSE
    assert facts(pipe) == {"tables": 1, "without": 0}


def test_embeddings_are_bitwise_the_plain_ones():
    """In bfloat16 the pipeline rounds time steps; each block's modulations agree at each step."""
    seen = []

    def watch(pipe):
        norm = pipe.transformer.single_transformer_blocks[1].norm
        plain = norm.forward

        def forward(x, emb):
            out = plain(x, emb=emb)
            seen.append(out[1])
            return out

        norm.forward = forward
        edit(pipe, num_inference_steps=4)
        del norm.forward
        made = list(seen)
        seen.clear()
        return made

    pipe = tiny_kontext(dtype=torch.bfloat16)
    plain = watch(pipe)
    fluxfire.optimize(pipe, [ModulationTable()])
    tabled = watch(pipe)
    assert len(plain) == len(tabled) == 4
    for one, other in zip(plain, tabled, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-4)
    assert not torch.equal(plain[0], plain[1])


def test_steps_that_are_not_the_schedulers_are_computed(pipe, monkeypatch):
    plain = edit(pipe)
    fluxfire.optimize(pipe, [ModulationTable()])
    monkeypatch.setattr(module._Tables, "_times", lambda *_: None)
    assert np.array_equal(edit(pipe), plain)
    assert facts(pipe) == {"tables": 0, "without": 1}


class Wandering(FlowMatchEulerDiscreteScheduler):
    """Replaces its time steps at the start, or at a given step."""

    forgets_at = 0

    def set_begin_index(self, begin_index=0):
        super().set_begin_index(begin_index)
        self.left = self.forgets_at
        self._wander()

    def step(self, *args, **kwargs):
        out = super().step(*args, **kwargs)
        self.left -= 1
        self._wander()
        return out

    def _wander(self):
        if self.left == 0:
            self.timesteps = self.timesteps + 7


def test_a_scheduler_that_forgets_its_steps(pipe):
    pipe.scheduler = Wandering.from_config(pipe.scheduler.config)
    plain = edit(pipe)
    fluxfire.optimize(pipe, [ModulationTable()])
    assert np.array_equal(edit(pipe), plain)
    assert facts(pipe) == {"tables": 0, "without": 1}


class Departing(FluxKontextPipeline):
    """Uses copies of the scheduler's time steps from the middle on."""

    @property
    def current_timestep(self):
        now = self._current_timestep
        if now is None or now > 700:
            return now
        return vars(self).setdefault(f"_at_{now}", now.clone())


def test_time_steps_that_depart_half_way(pipe):
    plain = edit(pipe, steps=4)
    pipe.__class__ = Departing
    fluxfire.optimize(pipe, [ModulationTable()])
    assert np.abs(edit(pipe, steps=4) - plain).max() < CLOSE
    assert facts(pipe) == {"tables": 1, "without": 1}


def test_offloading_layer_by_layer(reference):
    from accelerate import cpu_offload

    for first in (True, False):
        pipe = tiny_kontext()
        if first:
            cpu_offload(pipe.transformer, torch.device("cpu"))
        fluxfire.optimize(pipe, [ModulationTable()])
        if not first:
            cpu_offload(pipe.transformer, torch.device("cpu"))
        assert np.abs(edit(pipe) - reference).max() < CLOSE
        assert facts(pipe) == {"tables": 1, "without": 0}


def test_weights_in_host_memory_that_offloading_takes_are_refused(pipe):
    from accelerate import cpu_offload

    fluxfire.optimize(pipe, [ModulationTable(host=True)])
    cpu_offload(pipe.transformer, torch.device("cpu"))
    with pytest.raises(FluxfireError, match="in host memory are moved by something else, too"):
        edit(pipe)


def test_nothing_is_kept_also_after_an_exception(pipe):
    fluxfire.optimize(pipe, [ModulationTable()])
    (table,) = [x for x in pipe._fluxfire_conductor.listeners if isinstance(x, module._Tables)]
    rows = []

    def stop(pipe, step, timestep, kwargs):
        rows.extend(weakref.ref(t) for t in table._by_branch["cond"].blocks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, callback_on_step_end=stop)
    gc.collect()
    assert rows
    assert table._by_branch == {}
    assert all(row() is None for row in rows)


def test_a_call_outside_a_generation_is_plain(pipe):
    seen = {}

    class Watch(Listener):
        pass

    transformer = pipe.transformer
    plain_forward = transformer.forward

    def forward(*args, **kwargs):
        seen.update(kwargs)
        return plain_forward(*args, **kwargs)

    transformer.forward = forward
    edit(pipe)
    del transformer.forward
    with torch.no_grad():
        plain = transformer(**seen)[0]
        fluxfire.optimize(pipe, [ModulationTable()])
        assert torch.equal(transformer(**seen)[0], plain)


def test_caches_decide_as_without(pipe):
    cache = FirstBlockCache(0.2)
    fluxfire.optimize(pipe, [cache])
    edit(pipe, num_inference_steps=8)
    alone = fluxfire.report(pipe).runs[-1].decisions
    fluxfire.restore(pipe)
    fluxfire.optimize(pipe, [ModulationTable(), cache])
    edit(pipe, num_inference_steps=8)
    tabled = fluxfire.report(pipe).runs[-1].decisions
    assert [d.hits for d in tabled] == [d.hits for d in alone]


def test_on_a_cpu_there_is_nothing_to_send_away(pipe, reference):
    fluxfire.optimize(pipe, [ModulationTable(host=True)])
    (done,) = fluxfire.report(pipe).passes
    assert (done.change.bytes, done.change.host_bytes) == (0, 0)
    assert np.abs(edit(pipe) - reference).max() < CLOSE


@pytest.mark.slow
def test_rows_enter_compiled_blocks_as_tensors():
    pipe = tiny_kontext()
    plain = edit(pipe, num_inference_steps=4)
    fluxfire.optimize(pipe, [ModulationTable(), Compile()])
    for _ in range(2):
        assert np.abs(edit(pipe, num_inference_steps=4) - plain).max() < CLOSE
    first, second = fluxfire.report(pipe).runs
    assert (first.recompiles, first.graph_breaks) <= (1, 0)
    assert second.compiles == 0


def other_layer(pipe, step, kept):
    if step == 0:
        norm = pipe.transformer.transformer_blocks[0].norm1
        kept.append(norm.linear)  # keeps it alive, to put it back later
        new = torch.nn.Linear(norm.linear.in_features, norm.linear.out_features)
        torch.nn.init.constant_(new.weight, 0.05)
        torch.nn.init.zeros_(new.bias)
        norm.linear = new


def other_layer_edited(pipe, step, kept):
    other_layer(pipe, step, kept)
    if step == 1:
        pipe.transformer.transformer_blocks[0].norm1.linear.weight.data.mul_(-2)


def embedder(pipe, step, kept):
    embed = pipe.transformer.time_text_embed
    if step == 0:
        kept.append(embed.timestep_embedder)
        embed.timestep_embedder = copy.deepcopy(embed.timestep_embedder)
        embed.timestep_embedder.linear_2.weight.data.mul_(3)


def pooled_text(pipe, step, kept):
    kept[0].mul_(3)


def time_steps(pipe, step, kept):
    if step == 0:
        pipe.scheduler.timesteps[1:] *= 0.5


def adapter_off(pipe, step, kept):
    if step == 0:
        pipe.transformer.disable_adapters()


BETWEEN_STEPS = [other_layer, other_layer_edited, embedder, pooled_text, time_steps, adapter_off]


@pytest.mark.parametrize("change", BETWEEN_STEPS)
def test_changes_by_a_step_callback(pipe, change):
    plain = tiny_kontext()
    config = plain.transformer.config

    def run(of, change=None):
        pooled = torch.ones(1, config.pooled_projection_dim)
        kept = [pooled]

        def callback(_, step, *__):
            if change is not None:
                change(of, step, kept)
            return {}

        return edit(
            of,
            prompt=None,
            prompt_embeds=torch.ones(1, 24, config.joint_attention_dim),
            pooled_prompt_embeds=pooled,
            num_inference_steps=4,
            callback_on_step_end=callback,
        )

    if change is adapter_off:
        for each in (plain, pipe):
            targets = r"transformer_blocks\.0\.norm1\.linear"
            torch.manual_seed(0)
            config_ = LoKrConfig(r=2, alpha=8, target_modules=targets, init_weights=False)
            each.transformer.add_adapter(config_)
    before = run(copy.deepcopy(plain))
    fluxfire.optimize(pipe, [ModulationTable()])
    expected = run(plain, change)
    assert np.abs(expected - before).max() > 1e-4
    assert np.abs(run(pipe, change) - expected).max() < CLOSE
