"""Int8: what differs from `Float8`, which shares the code; and what the eight bits do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

import fluxfire
from fluxfire.environment import Environment
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.kernels.float8 import quantize_weight
from fluxfire.kernels.int8 import int8_linear, quantize_int8
from fluxfire.passes import Compile, Float8, FusedBlocks, Int8, QKVFusion
from fluxfire.passes.shared.eight_bits import QuantizedProduct
from fluxfire.protocol import Target
from fluxfire.testing import edit, tiny_kontext
from passes.test_folded_lora import load
from passes.test_qkv_fusion import with_lora


def rounded(x):
    """Round rows to int8: the arithmetic in float64."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return (x.double() / scale).round() * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_the_rounded_numbers(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 48), torch.randn(32, 48), torch.randn(32)
    x, bias = x.to(dtype), bias.to(dtype)
    made = int8_linear(x, *quantize_int8(weight), bias, dtype)
    exact = functional.linear(rounded(x), rounded(weight), bias.double())
    assert made.dtype is dtype
    assert (made.double() - exact).norm() < (
        1e-6 if dtype is torch.float32 else 0.005
    ) * exact.norm()


def test_it_rounds_a_third_as_much_as_float8():
    torch.manual_seed(0)
    weight = torch.randn(64, 3072)
    off = []
    for quantize in (quantize_int8, quantize_weight):
        data, scale = quantize(weight)
        off.append(float((data.float() * scale - weight).norm() / weight.norm()))
    assert off[0] < 0.01
    assert off[0] < 0.4 * off[1]


def test_rows_of_zeros_stay_zeros():
    data, scale = quantize_int8(torch.zeros(3, 16))
    assert not data.any()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("activations", ["int8", "plain"])
@pytest.mark.parametrize("fused", [False, True])
def test_pictures_are_nearer_than_those_of_float8(reference, activations, fused):
    others = [FusedBlocks()] if fused else []
    pipe, twin = tiny_kontext(), tiny_kontext()
    fluxfire.optimize(pipe, [Int8(activations=activations), *others])
    fluxfire.optimize(twin, [Float8(), *others])
    made, by_float8 = edit(pipe), edit(twin)
    assert 0 < np.abs(made - reference).mean() < 0.6 * np.abs(by_float8 - reference).mean()
    weights = [m.weight for m in pipe.transformer.modules() if isinstance(m, QuantizedProduct)]
    assert {weight.dtype for weight in weights} == {torch.int8}
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)


def test_plain_activations_are_not_rounded(pipe):
    linear = pipe.transformer.single_transformer_blocks[0].proj_mlp
    x = torch.randn(2, 7, 48)
    fluxfire.optimize(pipe, [Int8(activations="plain")])
    exact = functional.linear(x.double(), rounded(linear.weight), linear.bias.double())
    with torch.no_grad():
        assert (linear(x) - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("activations", ["int8", "plain"])
def test_a_lora_is_quantized_with_the_weight(activations):
    """Whenever it comes, and gone without a trace when it goes."""
    pipe, twin = tiny_kontext(), tiny_kontext()
    fluxfire.optimize(pipe, [Int8(activations=activations)])
    before = edit(pipe)
    load(pipe)
    load(twin)
    fluxfire.optimize(twin, [Int8(activations=activations)])
    assert np.array_equal(edit(pipe), edit(twin))
    pipe.unload_lora_weights()
    assert np.array_equal(edit(pipe), before)
    plain = edit(with_lora(tiny_kontext()))
    folded = fluxfire.optimize(with_lora(tiny_kontext()), [Int8(activations=activations)])
    assert 0 < np.abs(edit(folded) - plain).mean() < 0.01


def test_changed_weights_copies_and_drops(pipe, reference):
    fluxfire.optimize(pipe, [Int8()])
    made = edit(pipe)
    assert np.array_equal(edit(copy.deepcopy(pipe)), reference)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(2)
    assert not np.array_equal(edit(pipe), made)
    dropped = fluxfire.optimize(tiny_kontext(), [Int8("drop")])
    assert np.array_equal(edit(dropped), made)
    with pytest.raises(PlanError, match=r"Int8\(originals='drop'\) let go of the original weights"):
        fluxfire.restore(dropped)
    with pytest.raises(FluxfireError, match="originals='drop'"):
        dropped.transformer.state_dict()


def found(pass_, pipe, **facts):
    environment = Environment(
        "3.12", {}, "13.0", **{"gpu": "GTX 1080", "capability": (6, 1), "gpu_bytes": 1, **facts}
    )
    return list(pass_.check(Target(pipe, environment)))


def test_refusals(pipe, monkeypatch):
    with pytest.raises(ValueError, match="activations='float8'; it must be one of int8, plain"):
        Int8(activations="float8")
    with pytest.raises(ValueError, match="originals='keep'; it must be one of host, drop"):
        Int8("keep")
    with pytest.raises(PlanError, match="int8: the projections are fused already"):
        fluxfire.optimize(pipe, [QKVFusion(), Int8()])
    with pytest.raises(PlanError, match="both fill the slot 'quantization'"):
        fluxfire.optimize(pipe, [Float8(), Int8()])
    monkeypatch.setattr(type(pipe.transformer), "device", torch.device("cuda"))
    (refused,) = found(Int8(), pipe)
    assert str(refused) == (
        "GTX 1080 has compute capability 6.1, and int8 products need 7.5; use activations='plain'"
    )
    assert refused.instead == Int8(activations="plain")
    assert found(Int8(activations="plain"), pipe) == []
    assert found(Int8(), pipe, gpu="NVIDIA A100", capability=(8, 0)) == []


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], [FusedBlocks()]], ids=["alone", "fused"])
def test_compiled_blocks_stay_one_graph(others):
    plain = fluxfire.optimize(tiny_kontext(double_blocks=1, single_blocks=1), [Int8(), *others])
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    fluxfire.optimize(pipe, [Int8(), *others, Compile(fullgraph=True)])
    # Numbers on the edge between two steps of the scale may round either way.
    assert np.abs(edit(pipe, steps=1) - edit(plain, steps=1)).mean() < 1e-3
    (run,) = fluxfire.report(pipe).runs
    assert run.graph_breaks == 0
