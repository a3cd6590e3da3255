"""QKVFusion: storage, state dicts, and LoRA, against the plain pipeline."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fluxfire
from fluxfire import kontext
from fluxfire.errors import PlanError
from fluxfire.passes import Compile, MemoryLayout, QKVFusion
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext

CLOSE = 1e-5


def lora_weights(pipe, rank=4, seed=5):
    """Random LoRA weights on attention and feed-forward projections, as a file would hold."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(
            ("to_q", "to_k", "to_v", "add_k_proj", "proj_mlp")
        ):
            down = torch.randn(rank, module.in_features, generator=generator) * 0.3
            up = torch.randn(module.out_features, rank, generator=generator) * 0.3
            state[f"transformer.{name}.lora_A.weight"] = down
            state[f"transformer.{name}.lora_B.weight"] = up
    return state


def with_lora(pipe):
    pipe.load_lora_weights(lora_weights(pipe), adapter_name="style")
    return pipe


def storages(pipe):
    return kontext.storage_bytes(pipe)


def test_memory_stays_also_across_moves_and_casts(pipe):
    plain = tiny_kontext()
    fluxfire.optimize(pipe, [QKVFusion()])
    assert storages(pipe) == storages(plain)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        assert storages(pipe.to(dtype)) == storages(plain.to(dtype))
    attention = pipe.transformer.transformer_blocks[0].attn
    fused = attention.to_qkv.weight
    assert attention.to_q.weight.data_ptr() == fused.data_ptr()
    assert torch.equal(
        torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]), fused
    )


def test_keys_and_parameters_stay_stock(pipe):
    stock = {
        n: (list(m.state_dict()), [id(p) for p in m.parameters()]) for n, m in kontext.modules(pipe)
    }
    fluxfire.optimize(pipe, [QKVFusion()])
    for name, module in kontext.modules(pipe):
        assert (list(module.state_dict()), [id(p) for p in module.parameters()]) == stock[name]


def test_the_fused_product_is_used(pipe):
    """Zeroing the fused weight must show, or nothing was fused."""
    fluxfire.optimize(pipe, [QKVFusion()])
    picture = edit(pipe)
    pipe.transformer.transformer_blocks[0].attn.to_qkv.weight.zero_()
    assert not np.array_equal(edit(pipe), picture)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_lora_before_and_after_works_as_on_the_plain_pipeline(scale, reference):
    kwargs = {} if scale is None else {"joint_attention_kwargs": {"scale": scale}}
    expected = edit(with_lora(tiny_kontext()), **kwargs)
    assert np.abs(expected - reference).max() > 0.01
    before = fluxfire.optimize(with_lora(tiny_kontext()), [QKVFusion()])
    assert np.abs(edit(before, **kwargs) - expected).max() < CLOSE
    after = with_lora(fluxfire.optimize(tiny_kontext(), [QKVFusion()]))
    assert np.abs(edit(after, **kwargs) - expected).max() < CLOSE
    for pipe in (before, after):
        pipe.set_adapters(["style"], [0.0])
        assert np.abs(edit(pipe) - reference).max() < CLOSE
        pipe.unload_lora_weights()
        assert np.abs(edit(pipe) - reference).max() < CLOSE
        fluxfire.restore(pipe)
        assert np.array_equal(edit(pipe), reference)


def test_a_merged_lora_takes_effect_and_can_be_unmerged(reference):
    plain = with_lora(tiny_kontext())
    plain.fuse_lora()
    plain.unload_lora_weights()
    expected = edit(plain)
    pipe = with_lora(fluxfire.optimize(tiny_kontext(), [QKVFusion()]))
    pipe.fuse_lora()
    assert np.abs(edit(pipe) - expected).max() < CLOSE
    pipe.unload_lora_weights()
    assert np.abs(edit(pipe) - expected).max() < CLOSE
    assert np.abs(expected - reference).max() > 0.01


def test_replaced_weights_take_effect(pipe):
    donor = tiny_kontext(seed=7)
    fluxfire.optimize(pipe, [QKVFusion()])
    pipe.transformer.load_state_dict(copy.deepcopy(donor.transformer.state_dict()), assign=True)
    expected = tiny_kontext()
    expected.transformer.load_state_dict(donor.transformer.state_dict())
    assert np.abs(edit(pipe) - edit(expected)).max() < CLOSE


def test_restore_leaves_nothing_behind(pipe, reference):
    edit(pipe)
    before = fingerprint(pipe)
    fluxfire.optimize(pipe, [QKVFusion()])
    pipe.to(torch.float64).to(torch.float32)
    fluxfire.restore(pipe)
    assert differences(before, fingerprint(pipe)) == []
    assert not hasattr(pipe.vae.decoder.mid_block.attentions[0], "to_qkv")
    assert np.array_equal(edit(pipe), reference)


def test_parts(pipe):
    fluxfire.optimize(pipe, [QKVFusion(transformer=False)])
    assert fluxfire.report(pipe).passes[0].change.count == 2
    fluxfire.restore(pipe)
    fluxfire.optimize(pipe, [QKVFusion(vae=False)])
    assert fluxfire.report(pipe).passes[0].change.count == 2 * 2 + 3
    with pytest.raises(ValueError, match="has nothing to fuse"):
        QKVFusion(transformer=False, vae=False)


class Int8(torch.Tensor):
    """Stands for a quantised tensor subclass."""


def test_quantised_weights_are_refused(pipe):
    linear = pipe.transformer.transformer_blocks[0].attn.to_k
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Int8), requires_grad=False)
    with pytest.raises(PlanError, match="to_q, to_k, to_v are quantised") as caught:
        fluxfire.optimize(pipe, [QKVFusion()])
    assert "put QKVFusion before quantisation" in str(caught.value)


def test_diffusers_own_fusion_is_refused_by_name(pipe):
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(PlanError, match=r"call unfuse_qkv_projections\(\) first"):
        fluxfire.optimize(pipe, [QKVFusion()])


def test_swapped_weights_are_refused_by_name(pipe):
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    with pytest.raises(PlanError, match="layerwise-casting"):
        fluxfire.optimize(pipe, [QKVFusion()])


@pytest.mark.parametrize("passes", [[QKVFusion(vae=False)], [MemoryLayout()]])
def test_sequential_offload_is_refused_by_name(pipe, passes):
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, torch.device("cpu"))
    with pytest.raises(PlanError, match="module by module while the pipeline runs"):
        fluxfire.optimize(pipe, passes)


@pytest.mark.slow
def test_lora_under_compile():
    expected = edit(with_lora(tiny_kontext()))
    pipe = fluxfire.optimize(with_lora(tiny_kontext()), [QKVFusion(), Compile()])
    assert np.abs(edit(pipe) - expected).max() < 1e-4
    assert fluxfire.report(pipe).runs[-1].graph_breaks == 0
