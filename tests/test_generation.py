"""What listeners hear: steps, branches, tokens, beginnings and ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fluxfire
from doubles import Listen, Tally
from fluxfire import spark
from fluxfire.bench.phases import phases
from fluxfire.errors import FluxfireError, PassError
from fluxfire.passes import EncodingCache, FusedBlocks, ModulationTable
from fluxfire.runtime.conductor import runs_foreign_code
from fluxfire.testing import edit, tiny_kontext


@pytest.fixture
def heard():
    """An optimized pipeline and what its listener hears."""
    pipe = fluxfire.optimize(tiny_kontext(), [Listen()])
    return pipe, Listen.tallies[-1]


def test_steps_and_tokens(heard):
    pipe, tally = heard
    edit(pipe, (48, 32), steps=4)
    assert [(c.step, c.steps, c.branch) for c in tally.calls] == [(i, 4, "cond") for i in range(4)]
    tokens = tally.calls[0].tokens
    assert (tokens.noise, tokens.reference, tokens.text) == (96, 96, 24)
    times = [float(c.timestep[0]) for c in tally.calls]
    assert times[0] == 1
    assert times == sorted(times, reverse=True)


def test_branches_of_true_cfg(heard):
    pipe, tally = heard
    edit(pipe, negative_prompt="blurry", true_cfg_scale=2.0, steps=2)
    assert [(c.step, c.branch) for c in tally.calls] == [
        (0, "cond"),
        (0, "uncond"),
        (1, "cond"),
        (1, "uncond"),
    ]


def test_text_to_image_has_no_reference(heard):
    pipe, tally = heard
    edit(pipe, image=None)
    assert tally.calls[0].tokens.reference == 0


def test_inpainting():
    pipe = fluxfire.optimize(tiny_kontext("inpaint"), [Listen()])
    edit(pipe, steps=4, strength=0.5)
    calls = Listen.tallies[-1].calls
    assert [(c.step, c.steps) for c in calls] == [(0, 2), (1, 2)]
    assert calls[0].tokens.reference == calls[0].tokens.noise == 64


def test_what_begins_ends_when_a_generation_raises(heard):
    pipe, tally = heard

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        edit(pipe, callback_on_step_end=fail)
    assert (tally.open, tally.ended) == (0, 1)
    edit(pipe)
    assert [c.step for c in tally.calls] == [0, 0, 1, 2]


def test_a_listener_that_raises_does_not_block_the_pipeline(pipe, reference):
    class Deaf(Tally):
        def on_generation(self, generation):
            raise RuntimeError("deaf")

    class Broken(Listen):
        def apply(self, tx):
            tx.listen(Deaf())
            return super().apply(tx)

    fluxfire.optimize(pipe, [Broken()])
    with pytest.raises(RuntimeError, match="deaf"):
        edit(pipe)
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)


def test_direct_calls_of_the_transformer_are_no_steps(heard):
    pipe, tally = heard
    ids = torch.zeros(4, 3)
    with torch.no_grad():
        pipe.transformer(
            hidden_states=torch.zeros(1, 4, 16),
            encoder_hidden_states=torch.zeros(1, 2, 40),
            pooled_projections=torch.zeros(1, 24),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]),
            img_ids=ids,
            txt_ids=torch.zeros(2, 3),
        )
    assert tally.calls == []


def test_a_second_pipelines_generation_is_not_heard(heard):
    _, tally = heard
    edit(tiny_kontext())
    assert (tally.ended, tally.calls) == (0, [])


def test_a_transformer_that_the_user_compiled_stays_compiled(pipe, reference):
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    torch.compiler.reset()
    pipe.transformer.compile(backend=backend)
    fluxfire.optimize(pipe, [Listen()])
    assert np.abs(edit(pipe) - reference).max() < 1e-5
    assert frames
    fluxfire.restore(pipe)
    assert hasattr(pipe.transformer._compiled_call_impl, "_torchdynamo_orig_callable")


def test_compiling_by_hand_afterwards_is_noticed(pipe):
    fluxfire.optimize(pipe, [Listen()])
    pipe.transformer.compile()
    with pytest.raises(FluxfireError, match=r"compiled after optimize\(\), which cut fluxfire off"):
        edit(pipe)


def test_a_step_that_fails_takes_no_negative_time(pipe):
    fluxfire.optimize(pipe, [])
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the third step")

    pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        edit(pipe)
    steps = fluxfire.report(pipe).runs[-1].step_seconds
    assert len(steps) == 3
    assert min(steps) > 0


def test_generating_while_being_optimized_is_told_apart(pipe):
    class Generates(Listen):
        def apply(self, tx):
            edit(tx.pipe)

    with pytest.raises(PassError, match="is being optimized or restored"):
        fluxfire.optimize(pipe, [Generates()])


@pytest.mark.parametrize("make", [tiny_kontext, lambda: tiny_kontext("inpaint"), spark.load])
def test_plain_and_optimized_pipelines_run_no_code_of_others(make):
    """Else every step would look at all the weights."""
    pipe = make()
    assert not runs_foreign_code(pipe, pipe.__class__)
    fluxfire.optimize(pipe, [FusedBlocks(), ModulationTable(), EncodingCache()])
    with phases(pipe):
        assert not runs_foreign_code(pipe, pipe.__class__)
    pipe.scheduler.step = lambda *args, **kwargs: None
    assert runs_foreign_code(pipe, pipe.__class__)
