"""T5's weights in int8."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fluxfire
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.passes import EncodingCache, Int8TextEncoder
from fluxfire.testing import edit, tiny_kontext


def encode(pipe, prompt="make it night"):
    return pipe.encode_prompt(prompt, prompt, max_sequence_length=24)[0]


def rounded(weight):
    """Round each row to int8 with its own scale: the arithmetic in float64."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    return (weight.double() / scale).round() * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_computes_with_the_rounded_weights(dtype):
    pipe, twin = tiny_kontext(dtype=dtype), tiny_kontext(dtype=torch.float64)
    fluxfire.optimize(pipe, [Int8TextEncoder()])
    linears = dict(twin.text_encoder_2.named_modules())
    with torch.no_grad():
        for name, linear in pipe.text_encoder_2.named_modules():
            if isinstance(linear, nn.Linear):
                linears[name].weight.copy_(rounded(linear.weight))
            elif hasattr(linear, "weight"):
                linears[name].weight.copy_(linear.weight)
    wanted, made = encode(twin), encode(pipe)
    plain = encode(tiny_kontext(dtype=dtype)).double()
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.003}[dtype]
    assert made.dtype is dtype
    assert (made.double() - wanted).norm() / wanted.norm() < bound
    assert (plain - wanted).norm() / wanted.norm() > 0.004  # int8 is visible


def test_clip_is_left_alone(pipe):
    before = pipe._get_clip_prompt_embeds("make it night")
    fluxfire.optimize(pipe, [Int8TextEncoder()])
    assert torch.equal(pipe._get_clip_prompt_embeds("make it night"), before)


def test_restore_brings_the_bits_back(pipe, reference):
    state = {k: v.clone() for k, v in pipe.text_encoder_2.state_dict().items()}
    names = [*dict(pipe.text_encoder_2.named_modules())]
    fluxfire.optimize(pipe, [Int8TextEncoder()])
    assert not np.array_equal(edit(pipe), reference)
    assert {*pipe.text_encoder_2.state_dict()} == {*state}
    fluxfire.restore(pipe)
    assert [*dict(pipe.text_encoder_2.named_modules())] == names
    assert all(torch.equal(v, state[k]) for k, v in pipe.text_encoder_2.state_dict().items())
    assert np.array_equal(edit(pipe), reference)


@pytest.mark.parametrize("write", [
    lambda weight: weight.mul_(1.5),
    lambda weight: setattr(weight, "data", weight.data * 1.5),
], ids=["in place", "data"])  # fmt: skip
def test_changed_weights_are_quantized_again(pipe, write):
    twin = tiny_kontext()
    fluxfire.optimize(pipe, [Int8TextEncoder(), EncodingCache()])
    edit(pipe)
    with torch.no_grad():
        for one in (pipe, twin):
            write(one.text_encoder_2.encoder.block[0].layer[0].SelfAttention.v.weight)
    fluxfire.optimize(twin, [Int8TextEncoder()])
    assert np.array_equal(edit(pipe), edit(twin))


def test_a_changed_layer_is_refused(pipe):
    fluxfire.optimize(pipe, [Int8TextEncoder()])
    pipe.text_encoder_2.encoder.block[1].layer[0].SelfAttention.v.weight = nn.Parameter(
        torch.empty(32, 40, device="meta")
    )
    with pytest.raises(FluxfireError, match="changed or offloaded after Int8TextEncoder"):
        edit(pipe)


def test_moving_and_casting_keep_the_int8_weights(pipe):
    fluxfire.optimize(pipe, [Int8TextEncoder()])
    pipe.to(torch.bfloat16)
    stored = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.stored
    assert (stored.data.dtype, stored.scale.dtype) == (torch.int8, torch.float32)
    assert edit(pipe).shape[-1] == 3


def test_copies_are_plain(pipe, reference):
    fluxfire.optimize(pipe, [Int8TextEncoder()])
    made = edit(pipe)
    twin = copy.deepcopy(pipe)
    assert np.array_equal(edit(twin), reference)
    assert np.array_equal(edit(pipe), made)


def test_gradients_reach_the_input(pipe):
    """They are those of the rounded product, as for any frozen layer."""
    fluxfire.optimize(pipe, [Int8TextEncoder()])
    layer = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q
    x = torch.randn(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, rounded(layer.weight).float().sum(0).expand(2, -1), atol=1e-5)


def test_a_text_encoder_that_is_offloaded_is_refused(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.text_encoder_2, ModelHook())
    with pytest.raises(PlanError, match=r"offloading moves the text encoder's weights; use Placem"):
        fluxfire.optimize(pipe, [Int8TextEncoder()])
