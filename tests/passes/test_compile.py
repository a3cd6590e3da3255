"""Compile, mostly with inductor on the CPU, so most tests are slow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.loaders.ip_adapter import FluxIPAdapterMixin
from peft import LoraConfig

import fluxfire
from fluxfire import presets
from fluxfire.errors import PlanError
from fluxfire.passes import Compile, QKVFusion
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from thinned import exhaustive, half

CLOSE = 1e-4


def smallest():
    """A pipeline with one block of each kind; more blocks would only take longer to compile."""
    return tiny_kontext(double_blocks=1, single_blocks=1)


def test_configuration_is_plain_data():
    one = Compile(options={"b": 1, "a": True})
    assert one == Compile(options=[("a", True), ("b", 1)])
    assert repr(one).endswith("options=(('a', True), ('b', 1)))")
    assert hash(one) == hash(eval(repr(one)))
    with pytest.raises(ValueError, match="region='all'; it must be one of blocks, transformer"):
        Compile(region="all")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fullgraph": "no"}, "fullgraph='no'; it must be True or False"),
        ({"vae": "encoder"}, "vae='encoder'; it must be True or False"),
        ({"dynamic": 1}, "dynamic=1; it must be True, False or None"),
    ],
)
def test_settings_of_the_wrong_kind(settings, words):
    with pytest.raises(TypeError, match=words):
        Compile(**settings)


@pytest.mark.parametrize(
    ("pass_", "words"),
    [
        (Compile(mode="fastest"), "torch.compile has no mode 'fastest'; it has default, lite"),
        (Compile(options={"max_autotuna": 1}), "inductor has no option max_autotuna"),
        (Compile(options={"max_autotune": "yes"}), "torch.compile refuses the options: .*got str"),
        (Compile(mode="reduce-overhead"), "CUDA graphs of the blocks overwrite each other"),
    ],
)
def test_settings_that_cannot_work_are_refused(pipe, pass_, words):
    with pytest.raises(PlanError, match=words):
        fluxfire.optimize(pipe, [pass_])


def test_a_pipeline_that_is_compiled_already_is_refused(pipe):
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    with pytest.raises(PlanError, match="compiled already, outside fluxfire"):
        fluxfire.optimize(pipe, [Compile()])


def test_what_the_cpu_needs_is_asked_for_by_name(pipe, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    said = " ".join(fluxfire.plan(pipe, [Compile()]).complaints())
    assert "needs a C++ compiler; install g++ or clang++" in said
    assert "/nowhere has no Python.h" in said


def test_a_native_cache_is_refused(pipe):
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(PlanError, match="the hooks of native-cache break the graph"):
        fluxfire.optimize(pipe, [Compile()])


def test_model_offload_is_refused_for_the_whole_transformer_alone(pipe):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.transformer, "cpu")
    assert not any("break the graph" in c for c in fluxfire.plan(pipe, [Compile()]).complaints())
    refused = fluxfire.plan(pipe, [Compile(region="transformer")])
    assert "model-offload" in refused.complaints()[0]


def test_mode_and_options_travel_together():
    options = Compile(mode="max-autotune-no-cudagraphs", options={"shape_padding": True})
    assert options._inductor_options() == {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "shape_padding": True,
    }
    overruled = Compile(mode="max-autotune", options={"triton.cudagraphs": False})
    assert overruled._inductor_options()["triton.cudagraphs"] is False


@pytest.mark.slow
def test_blocks_share_graphs_and_report_them(reference):
    pipe = tiny_kontext()
    edit(pipe)
    before = fingerprint(pipe)
    fluxfire.optimize(pipe, [Compile()])
    assert np.abs(edit(pipe) - reference).max() < CLOSE
    edit(pipe)
    first, second = fluxfire.report(pipe).runs
    # One graph for the double blocks, two for the single ones: the first single block gets
    # separate streams, the others get views of one tensor.
    assert (first.compiles, first.recompiles, first.graph_breaks) == (3, 1, 0)
    assert (second.compiles, second.recompiles) == (0, 0)
    fluxfire.restore(pipe)
    assert differences(before, fingerprint(pipe)) == []
    assert np.array_equal(edit(pipe), reference)


@exhaustive
@pytest.mark.slow
def test_it_can_be_undone_and_redone_more_often_than_dynamos_limit():
    limit = torch._dynamo.config.recompile_limit
    pipe = smallest()
    reference = edit(pipe)
    for _ in range(limit + 2):
        with fluxfire.optimized(pipe, [Compile(fullgraph=True)]):
            assert np.abs(edit(pipe, steps=1) - edit(pipe, steps=1)).max() == 0
    assert np.array_equal(edit(pipe), reference)


@exhaustive
@pytest.mark.slow
def test_dynamic_graphs_fit_every_size():
    plain = smallest()
    pipe = fluxfire.optimize(smallest(), [QKVFusion(), Compile(dynamic=True)])
    for size in ((32, 32), (48, 32), (64, 48), (64, 64)):
        assert np.abs(edit(pipe, size) - edit(plain, size)).max() < CLOSE
    assert [r.compiles for r in fluxfire.report(pipe).runs][1:] == [0, 0, 0]


@exhaustive
@pytest.mark.slow
def test_the_vae_too():
    pipe = fluxfire.optimize(smallest(), [Compile(vae=True)])
    assert np.abs(edit(pipe) - edit(smallest())).max() < CLOSE
    assert fluxfire.report(pipe).passes[0].change.count == 2 + 2
    assert fluxfire.report(pipe).runs[0].compiles == 2 + 2


@pytest.mark.slow
def test_a_lora_scale_under_compile_is_right():
    """torch's caches once stored symbolic Python floats as constants in graphs."""
    from passes.test_qkv_fusion import with_lora

    plain = with_lora(smallest())
    pipe = fluxfire.optimize(with_lora(smallest()), [Compile()])
    for scale in (1.0, 0.4, 0.7, 0.2):
        call = {"joint_attention_kwargs": {"scale": scale}, "steps": 1}
        assert np.abs(edit(pipe, **call) - edit(plain, **call)).max() < CLOSE


def with_ip_adapter(pipe):
    """Give the transformer random IP-Adapter weights, as `load_ip_adapter` would."""
    transformer = pipe.transformer
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    joint, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    image = {
        "proj.weight": random(4 * joint, 12),
        "proj.bias": random(4 * joint),
        "norm.weight": torch.ones(joint),
        "norm.bias": torch.zeros(joint),
    }
    layers = {}
    for i in range(len(transformer.transformer_blocks)):
        for kind in ("k", "v"):
            layers[f"{i}.to_{kind}_ip.weight"] = random(inner, joint)
            layers[f"{i}.to_{kind}_ip.bias"] = random(inner)
    transformer._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}])
    assert isinstance(pipe, FluxIPAdapterMixin)
    pipe.set_ip_adapter_scale(1.0)
    transformer.to(torch.float32)
    return pipe


@pytest.mark.parametrize(
    "passes", [[QKVFusion()], pytest.param([Compile()], marks=pytest.mark.slow)]
)
def test_ip_adapter_inputs_are_right(passes, reference):
    call = {
        "ip_adapter_image_embeds": [torch.randn(1, 1, 12, generator=torch.Generator())],
        "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 12)],
    }
    expected = edit(with_ip_adapter(tiny_kontext()), **call)
    assert np.abs(expected - reference).max() > 1e-3
    pipe = fluxfire.optimize(with_ip_adapter(tiny_kontext()), passes)
    assert np.abs(edit(pipe, **call) - expected).max() < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("preset", half(["faithful", "article"], 0))
def test_presets_run(preset):
    reference = edit(smallest())
    pipe = fluxfire.optimize(smallest(), preset)
    assert [p.name for p in fluxfire.report(pipe).passes] == [
        p.name for p in getattr(presets, preset)
    ]
    assert np.abs(edit(pipe) - reference).max() < CLOSE
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)


def test_cuda_graphs_of_text_encoders_are_refused(pipe):
    asked = Compile("transformer", text_encoders=True, mode="reduce-overhead")
    assert "overwrite each other" in fluxfire.plan(pipe, [asked]).complaints()[0]


def test_no_text_encoders_at_all(pipe):
    pipe.text_encoder = pipe.text_encoder_2 = None
    (said,) = fluxfire.plan(pipe, [Compile(text_encoders=True)]).complaints()
    assert "the pipeline has no text encoder; use Compile(text_encoders=False)" in said


@pytest.mark.slow
def test_the_text_encoders_too():
    pipe = smallest()
    plain = edit(pipe)
    fluxfire.optimize(pipe, [Compile(text_encoders=True)])
    assert np.abs(edit(pipe) - plain).max() < CLOSE
    edit(pipe)
    first, second = fluxfire.report(pipe).runs
    # One graph for CLIP's layers; two for T5's, since its first layer computes the position bias.
    assert (first.compiles, first.graph_breaks, second.compiles) == (2 + 3, 0, 0)
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dora_runs_without_its_graph(when, monkeypatch):
    """torch cannot compile PEFT's DoRA. The other blocks keep their graphs."""
    graphs = []

    def compile_nothing(call, **_):
        def graph(*args, **kwargs):
            graphs.append(call.__self__)
            return call(*args, **kwargs)

        return graph

    def load(pipe):
        config = LoraConfig(r=2, use_dora=True, target_modules=["proj_mlp"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe.transformer.add_adapter(config)
        return pipe

    monkeypatch.setattr(torch, "compile", compile_nothing)
    pipe = smallest()
    if when == "before":
        plan = fluxfire.plan(load(pipe), [Compile()])
        assert "such as a DoRA: what has one runs without its graph" in str(plan)
    fluxfire.optimize(pipe, [Compile()])
    if when == "after":
        edit(pipe, steps=1)
        assert len(graphs) == 2
        graphs.clear()
        load(pipe)
    assert np.abs(edit(pipe, steps=1) - edit(load(smallest()), steps=1)).max() < CLOSE
    assert graphs == [pipe.transformer.transformer_blocks[0]]
