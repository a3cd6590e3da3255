"""The run through the blocks, against oracles made of plain diffusers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fluxfire
from doubles import HalfTheTokens, SkipBlock
from fluxfire import Change
from fluxfire.passes import Compile, FirstBlockCache, ReferenceCache
from fluxfire.testing import edit, tiny_kontext

BLOCKS = 5


class Nothing(nn.Module):
    """A block that does nothing: the oracle for one that is skipped."""

    def forward(self, hidden_states, encoder_hidden_states, **_):
        return encoder_hidden_states, hidden_states


def without_block(pipe, index):
    lists = (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks)
    blocks = lists[0] if index < len(lists[0]) else lists[1]
    blocks[index if index < len(lists[0]) else index - len(lists[0])] = Nothing()
    return pipe


@pytest.mark.parametrize("index", range(BLOCKS))
def test_a_skipped_block_is_as_one_that_does_nothing(pipe, index, reference):
    expected = edit(without_block(tiny_kontext(), index))
    fluxfire.optimize(pipe, [SkipBlock(index=index)])
    assert np.array_equal(edit(pipe), expected)
    assert not np.array_equal(expected, reference)


def test_half_the_tokens_are_as_a_call_without_a_reference(pipe, reference):
    """Without reference tokens in the blocks, the edit is text-to-image."""
    fluxfire.optimize(pipe, [HalfTheTokens()])
    assert np.abs(edit(pipe) - edit(tiny_kontext(), image=None)).max() < 1e-5
    assert np.abs(edit(pipe) - reference).max() > 1e-3


def test_wrappers_nest_in_list_order(pipe):
    expected = edit(without_block(tiny_kontext(), 3), image=None)
    fluxfire.optimize(pipe, [SkipBlock(index=3), HalfTheTokens()])
    assert np.abs(edit(pipe) - expected).max() < 1e-5


def test_the_real_blocks_are_back_even_after_an_exception(pipe):
    class Failing(SkipBlock):
        def apply(self, tx):
            def fail(run, streams, blocks, call):
                raise RuntimeError("inside")

            tx.wrap_blocks(fail)
            return super().apply(tx)

    real = pipe.transformer.transformer_blocks
    fluxfire.optimize(pipe, [Failing()])
    with pytest.raises(RuntimeError, match="inside"):
        edit(pipe)
    assert pipe.transformer.transformer_blocks is real
    assert "transformer_blocks" not in vars(pipe.transformer)


def controlled(transformer, inputs, samples):
    with torch.no_grad():
        return transformer(**inputs, **samples)[0]


class Same(SkipBlock):
    """A wrapper that changes nothing."""

    def apply(self, tx):
        tx.wrap_blocks(lambda run, streams, blocks, call: run(streams, blocks))
        return Change(0, "things")


@pytest.mark.parametrize(
    "wrapper", [Same(), FirstBlockCache(0), ReferenceCache(0)], ids=lambda p: p.name
)
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("double", [0, 1, 2])
@pytest.mark.parametrize("single", [0, 2, 3])
def test_controlnet_residuals_reach_the_same_blocks(pipe, wrapper, repeat, double, single):
    """A wrapper that changes nothing, against the plain transformer with residuals."""
    transformer = pipe.transformer
    width = transformer.inner_dim
    generator = torch.Generator().manual_seed(0)

    def samples(count):
        return [torch.randn(1, 8, width, generator=generator) for _ in range(count)] or None

    residuals = {
        "controlnet_block_samples": samples(double),
        "controlnet_single_block_samples": samples(single),
        "controlnet_blocks_repeat": repeat,
    }
    ids = torch.zeros(8, 3)
    ids[4:, 0] = 1
    inputs = {
        "hidden_states": torch.randn(1, 8, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 40, generator=generator),
        "pooled_projections": torch.randn(1, 24, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }
    expected = controlled(copy.deepcopy(transformer), inputs, residuals)

    fluxfire.optimize(pipe, [wrapper])
    seen = []

    def inside(*_):  # the wrapper acts only within a generation
        seen.append(controlled(transformer, inputs, residuals))
        return {}

    edit(pipe, steps=1, callback_on_step_end=inside)
    assert torch.equal(seen[0], expected)


@pytest.mark.slow
def test_wrappers_between_compiled_blocks_break_no_graph():
    plain = fluxfire.optimize(tiny_kontext(), [SkipBlock(), HalfTheTokens()])
    expected = {size: edit(plain, size) for size in ((32, 32), (48, 32))}
    pipe = fluxfire.optimize(
        tiny_kontext(), [SkipBlock(), HalfTheTokens(), Compile(fullgraph=True)]
    )
    for size, picture in expected.items():
        assert np.abs(edit(pipe, size) - picture).max() < 1e-4
    runs = fluxfire.report(pipe).runs
    assert [r.graph_breaks for r in runs] == [0, 0]
    edit(pipe)
    assert fluxfire.report(pipe).runs[-1].compiles == 0


def test_one_graph_of_the_whole_transformer_is_refused_with_wrappers(pipe):
    planned = fluxfire.plan(pipe, [SkipBlock(), Compile(region="transformer")])
    assert "an earlier pass decides between the blocks" in planned.complaints()[0]
