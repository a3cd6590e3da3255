"""QKVFusion: storage, state dicts and LoRA, compared with the plain pipeline."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline

import fluxfire
from fluxfire import modules
from fluxfire.errors import PlanError
from fluxfire.passes import Compile, Float8, MemoryLayout, QKVFusion
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from thinned import exhaustive

CLOSE = 1e-5


def lora_weights(pipe, rank=4, seed=5):
    """Random LoRA weights for attention and feed-forward projections, in a file's format."""
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
    return modules.storage_bytes(pipe)


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
        n: (list(m.state_dict()), [id(p) for p in m.parameters()])
        for n, m in modules.components(pipe)
    }
    fluxfire.optimize(pipe, [QKVFusion()])
    for name, module in modules.components(pipe):
        assert (list(module.state_dict()), [id(p) for p in module.parameters()]) == stock[name]


def test_the_fused_product_is_used(pipe):
    """Zeroing the fused weight must change the picture, or nothing was fused."""
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
    # Every triple of the transformer carries the LoRA; the two of the VAE do not.
    assert fluxfire.report(before).passes[0].change.count == 2
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
    """Stands for a quantized tensor subclass."""


def test_quantized_weights_are_refused(pipe):
    linear = pipe.transformer.transformer_blocks[0].attn.to_k
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Int8), requires_grad=False)
    with pytest.raises(PlanError, match="to_q, to_k, to_v are quantized") as caught:
        fluxfire.optimize(pipe, [QKVFusion()])
    assert "put QKVFusion before quantization" in str(caught.value)


def test_weights_that_an_earlier_pass_quantized_are_refused(pipe):
    with pytest.raises(PlanError, match="an earlier pass quantized the weights") as refused:
        fluxfire.optimize(pipe, [Float8(), QKVFusion()])
    assert refused.value.suggestion == (Float8(),)
    fluxfire.optimize(pipe, [Float8(), QKVFusion(transformer=False)])


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


def test_a_sister_pipeline_and_direct_calls_see_replaced_weights(pipe):
    donor = tiny_kontext(seed=7)
    fluxfire.optimize(pipe, [QKVFusion()])
    sister = FluxKontextPipeline.from_pipe(pipe)
    sister.set_progress_bar_config(disable=True)
    pipe.transformer.load_state_dict(copy.deepcopy(donor.transformer.state_dict()), assign=True)
    expected = tiny_kontext()
    expected.transformer.load_state_dict(donor.transformer.state_dict())
    assert np.abs(edit(sister) - edit(expected)).max() < CLOSE


def test_gradients_reach_the_projections(pipe):
    fluxfire.optimize(pipe, [QKVFusion()])
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_qkv(torch.ones(1, 2, 48)).sum().backward()
    assert attention.to_q.weight.grad is not None


def test_a_users_hook_on_a_projection_is_heard(reference):
    def hooked(pipe):
        attention = pipe.transformer.transformer_blocks[0].attn
        attention.to_q.register_forward_hook(lambda module, inputs, out: out * 0)
        return pipe

    expected = edit(hooked(tiny_kontext()))
    assert np.abs(expected - reference).max() > 1e-3
    pipe = hooked(fluxfire.optimize(tiny_kontext(), [QKVFusion()]))
    assert np.abs(edit(pipe) - expected).max() < CLOSE


def test_layerwise_casting_enabled_afterwards():
    def cast(pipe):
        pipe.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
        return pipe

    expected = edit(cast(tiny_kontext()))
    pipe = cast(fluxfire.optimize(tiny_kontext(), [QKVFusion()]))
    assert np.abs(edit(pipe) - expected).max() < CLOSE


def test_sequential_offload_enabled_afterwards(reference):
    from accelerate import cpu_offload

    pipe = fluxfire.optimize(tiny_kontext(), [QKVFusion()])
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert np.abs(edit(pipe) - reference).max() < CLOSE


def test_weights_stay_good_for_training_when_applied_in_inference_mode(pipe):
    edit(pipe)
    before = fingerprint(pipe)
    with torch.inference_mode():
        fluxfire.optimize(pipe, [QKVFusion(), MemoryLayout()])
        edit(pipe)
        fluxfire.restore(pipe)
    assert differences(before, fingerprint(pipe)) == []


def test_a_copy_can_be_optimized_again(pipe, reference):
    twin = copy.deepcopy(fluxfire.optimize(pipe, [QKVFusion()]))
    fluxfire.optimize(twin, [QKVFusion()])
    assert fluxfire.report(twin).passes[0].change.count == 9
    assert np.abs(edit(twin) - reference).max() < CLOSE
    fluxfire.restore(twin)
    assert np.abs(edit(twin) - reference).max() < CLOSE


def test_a_vae_that_was_fused_and_unfused_is_plain(pipe):
    pipe.vae.fuse_qkv_projections()
    pipe.vae.unfuse_qkv_projections()
    plain = edit(pipe)
    with fluxfire.optimized(pipe, [QKVFusion()]):
        assert np.abs(edit(pipe) - plain).max() < 1e-5
    assert np.array_equal(edit(pipe), plain)


def test_unfused_by_hand_in_between(pipe, reference):
    fluxfire.optimize(pipe, [QKVFusion()])
    pipe.transformer.unfuse_qkv_projections()
    assert np.abs(edit(pipe) - reference).max() < CLOSE
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)


def test_other_components_do_not_matter(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.text_encoder_2, torch.device("cpu"))
    assert fluxfire.plan(pipe, [QKVFusion(), MemoryLayout()]).ok
    pipe.vae.to("meta")
    assert "the vae's weights are on the meta device" in fluxfire.plan(pipe, []).problems[0]
    pipe.vae = None
    assert fluxfire.plan(pipe, [QKVFusion(), MemoryLayout()]).ok


@exhaustive
@pytest.mark.slow
def test_lora_under_compile():
    expected = edit(with_lora(tiny_kontext()))
    pipe = fluxfire.optimize(with_lora(tiny_kontext()), [QKVFusion(), Compile()])
    assert np.abs(edit(pipe) - expected).max() < 1e-4
    assert fluxfire.report(pipe).runs[-1].graph_breaks == 0
