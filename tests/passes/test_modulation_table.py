"""ModulationTable: whose steps it knows, what it looks up, and what it leaves behind."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

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
    """In bfloat16, where the pipeline rounds time steps: each block's modulations, step by step."""
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
    monkeypatch.setattr(module._Table, "_times", lambda *_: None)
    assert np.array_equal(edit(pipe), plain)
    assert facts(pipe) == {"tables": 0, "without": 1}


class Wandering(FlowMatchEulerDiscreteScheduler):
    """Forgets which time steps it gave out, where it begins or at the step that it is told."""

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
    """Goes its own way half-way: there its time steps are copies of the scheduler's."""

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
    (table,) = [x for x in pipe._fluxfire_conductor.listeners if isinstance(x, module._Table)]
    rows = []

    def stop(pipe, step, timestep, kwargs):
        rows.extend(weakref.ref(t) for t in table._rows["cond"].blocks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, callback_on_step_end=stop)
    gc.collect()
    assert rows
    assert table._rows == {}
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
