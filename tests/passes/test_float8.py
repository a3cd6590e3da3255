"""Float8: quantized layers, original weights, and undo."""

from __future__ import annotations

import copy
import pickle
from statistics import median

import accelerate
import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from peft import LoraConfig

import fluxfire
from fluxfire import modules, spark
from fluxfire.bench import compare
from fluxfire.environment import Environment
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.kernels.float8 import E4M3
from fluxfire.passes import Compile, Float8, FusedBlocks, QKVFusion
from fluxfire.passes.shared.eight_bits import QuantizedLinear, QuantizedProduct
from fluxfire.protocol import Target
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from passes.test_qkv_fusion import with_lora


def quantized(pipe):
    """Return the names of the layers with a float8 product."""
    return {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, QuantizedLinear) or name.endswith(("to_qkv", "to_added_qkv"))
    }


def test_the_rule_which_layers(pipe):
    fluxfire.optimize(pipe, [Float8()])
    double = {"attn.to_qkv", "attn.to_added_qkv", "attn.to_out.0", "attn.to_add_out"}
    double |= {f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")}
    single = {"attn.to_qkv", "proj_mlp", "proj_out"}
    expected = {f"transformer_blocks.{i}.{name}" for i in range(2) for name in double}
    expected |= {f"single_transformer_blocks.{i}.{name}" for i in range(3) for name in single}
    assert quantized(pipe) == expected
    for module in pipe.transformer.modules():
        if isinstance(module, QuantizedProduct):
            assert module.weight.dtype is E4M3


def test_a_product_is_that_of_the_rounded_numbers(pipe):
    linear = pipe.transformer.single_transformer_blocks[0].proj_mlp
    x = torch.randn(2, 7, 48)
    plain = linear(x).detach()
    fluxfire.optimize(pipe, [Float8()])
    product = linear.product
    exact = torch.nn.functional.linear(
        x.double(), product.weight.double() * product.scale.double(), linear.bias.double()
    ).detach()
    with torch.no_grad():
        made = linear(x)
    assert 0 < (made - plain).norm() < 0.06 * plain.norm()
    assert (made - exact).norm() < 0.04 * exact.norm()  # x is rounded as well


def test_files_are_those_of_the_plain_pipeline(pipe, tmp_path):
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    fluxfire.optimize(pipe, [Float8()])
    after = pipe.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    pipe.save_pretrained(tmp_path)
    again = FluxKontextPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in again.transformer.state_dict().items())


def test_bytes_are_told_truly(pipe):
    before = modules.storage_bytes(pipe)
    fluxfire.optimize(pipe, [Float8()])
    (done,) = fluxfire.report(pipe).passes
    weights = sum(
        m.weight.nbytes for m in pipe.transformer.modules() if isinstance(m, QuantizedProduct)
    )
    assert modules.storage_bytes(pipe) - before == done.change.bytes > weights > 0
    assert done.change.host_bytes == 0  # a CPU's memory is the host's


@pytest.mark.parametrize("generate", [True, False])
def test_dropped_originals(generate, reference):
    pipe = tiny_kontext()
    before = fingerprint(pipe)
    fluxfire.optimize(pipe, [Float8("drop")])
    if not generate:
        fluxfire.restore(pipe)
        assert np.array_equal(edit(pipe), reference)
        assert (
            differences(before, fingerprint(pipe)) != []
        )  # a first call adds attributes of its own
        return
    picture = edit(pipe)
    assert 0 < np.abs(picture - reference).max() < 0.1
    assert any(p.is_meta for p in pipe.transformer.parameters())
    with pytest.raises(PlanError, match=r"originals='drop'\) let go of the original weights. Not"):
        fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), picture)
    assert [p.name for p in fluxfire.report(pipe).passes] == ["float8"]


@pytest.fixture
def dropped(pipe):
    fluxfire.optimize(pipe, [Float8("drop")])
    edit(pipe)
    return pipe


GONE = r"let go of"


def doubled():
    return {k: v * 2 for k, v in tiny_kontext().transformer.state_dict().items()}


def quantized_afresh(state):
    pipe = tiny_kontext()
    pipe.transformer.load_state_dict(state)
    return edit(fluxfire.optimize(pipe, [Float8()]))


def test_dropped_weights_move_and_cast(dropped):
    before = edit(dropped)
    assert np.array_equal(edit(dropped.to("cpu")), before)
    dropped.to(torch.bfloat16)
    cast = fluxfire.optimize(tiny_kontext(), [Float8()])
    cast.to(torch.bfloat16)
    products = (m for m in dropped.transformer.modules() if isinstance(m, QuantizedProduct))
    assert all(product.dtype is torch.bfloat16 for product in products)
    assert {p.dtype for p in dropped.transformer.parameters()} == {torch.bfloat16}
    assert np.abs(edit(dropped) - edit(cast)).max() < 0.02
    dropped.to(torch.float32)
    assert np.abs(edit(dropped) - before).max() < 0.05
    dropped.transformer.half().float()


def test_what_would_need_dropped_weights_is_refused(dropped, tmp_path):
    before = edit(dropped)
    transformer = dropped.transformer
    block = transformer.single_transformer_blocks[0]
    weight = block.proj_mlp.weight
    for wish in (
        transformer.state_dict,
        lambda: dropped.save_pretrained(tmp_path / "pipe"),
        lambda: transformer.save_pretrained(tmp_path / "model"),
        lambda: torch.save(transformer, tmp_path / "model.pt"),
        lambda: copy.deepcopy(dropped),
        lambda: copy.deepcopy(transformer),
        lambda: copy.deepcopy(block),
        lambda: pickle.dumps(dropped),
        lambda: pickle.dumps(block),
        weight.sum,
        lambda: weight.data.add_(1),
        weight.detach,
        lambda: weight.T,
        lambda: weight[0],
        lambda: setattr(weight, "data", torch.ones(192, 48)),
        lambda: transformer.requires_grad_(True),
    ):
        with pytest.raises(FluxfireError, match=GONE):
            wish()
    assert np.array_equal(edit(dropped), before)


def test_what_is_known_of_dropped_weights(dropped):
    transformer, plain = dropped.transformer, tiny_kontext().transformer
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    assert {name: p.shape for name, p in transformer.named_parameters()} == shapes
    assert transformer.num_parameters() == plain.num_parameters()
    assert (transformer.dtype, transformer.device) == (plain.dtype, plain.device)
    transformer.requires_grad_(False)
    transformer.zero_grad()
    gone = transformer.single_transformer_blocks[0].proj_mlp.weight
    assert repr(gone) == "DroppedWeight(shape=(192, 48), dtype=torch.float32)"


@pytest.mark.parametrize("assign", [False, True])
def test_dropped_weights_are_loaded_again(dropped, assign):
    dropped.transformer.load_state_dict(doubled(), assign=assign)
    assert np.array_equal(edit(dropped), quantized_afresh(doubled()))
    assert dropped.transformer.single_transformer_blocks[0].proj_mlp.weight.is_meta


@pytest.mark.parametrize("assign", [False, True])
def test_dropped_weights_are_loaded_in_part(dropped, assign):
    """Weights of one fused product must be loaded together; other weights need not."""
    state = doubled()
    parts = ("blocks.1.", "proj_mlp", "norm.linear", "x_embedder", "bias")
    part = {k: v for k, v in state.items() if any(x in k for x in parts)}
    dropped.transformer.load_state_dict(part, strict=False, assign=assign)
    expected = tiny_kontext().transformer.state_dict() | part
    assert np.array_equal(edit(dropped), quantized_afresh(expected))
    alone = {k: v for k, v in state.items() if "blocks.0.attn.to_q" in k}
    dropped.transformer.load_state_dict(alone, strict=False, assign=assign)
    with pytest.raises(FluxfireError, match="others that share a product with them were not"):
        edit(dropped)


def test_a_state_of_another_shape_leaves_dropped_weights_alone(dropped):
    before = edit(dropped)
    wrong = {k: v for k, v in doubled().items() if "proj_mlp.weight" in k}
    wrong = {k: v[:, :-1] for k, v in wrong.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        dropped.transformer.load_state_dict(wrong, strict=False)
    assert np.array_equal(edit(dropped), before)


def test_a_lora_beside_dropped_weights(dropped):
    """On layers that are not quantized it works. On quantized ones it is refused, and removable."""

    def add(pipe, target):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        pipe.transformer.add_adapter(config)

    plain, before = tiny_kontext(), edit(dropped)
    for one in (plain, dropped):
        add(one, "norm.linear")
    effect = np.abs(edit(plain) - before).max()
    assert effect > 0.03
    assert np.abs(edit(plain) - edit(dropped)).max() < effect
    dropped.transformer.unload_lora()
    add(dropped, "proj_mlp")
    with pytest.raises(
        FluxfireError, match=r"blocks\.0\.proj_mlp has an adapter .*drop.*; take that"
    ):
        edit(dropped)
    with pytest.raises(FluxfireError, match=GONE):
        dropped.transformer.fuse_lora()
    dropped.transformer.unload_lora()
    assert np.array_equal(edit(dropped), before)


def test_with_dropped_originals_a_layer_with_a_lora_keeps_its_weights(reference):
    expected = edit(with_lora(tiny_kontext()))
    pipe = fluxfire.optimize(with_lora(tiny_kontext()), [Float8("drop")])
    assert not any("proj_mlp" in name for name in quantized(pipe))
    assert np.abs(edit(pipe) - expected).max() < 0.1
    assert np.abs(edit(pipe) - reference).max() > 1e-3


@pytest.mark.parametrize("target", ["to_q", "add_v_proj", "to_add_out"])
def test_an_adapter_on_one_projection_leaves_its_neighbours_alone_in_float8(target):
    """DoRA cannot be folded. diffusers calls either all fused projections, or none."""

    def made():
        pipe = tiny_kontext()
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False, use_dora=True)
        torch.manual_seed(0)
        pipe.transformer.add_adapter(config)
        return pipe

    expected = edit(made())
    for passes in ([Float8()], [Float8(), FusedBlocks()]):
        pipe = fluxfire.optimize(made(), passes)
        assert not any(name.endswith(f".{target}") for name in quantized(pipe))
        beside = {"to_q": "to_k", "add_v_proj": "add_q_proj", "to_add_out": "to_qkv"}[target]
        assert any(name.endswith(f"transformer_blocks.0.attn.{beside}") for name in quantized(pipe))
        assert 0 < np.abs(edit(pipe) - expected).max() < 0.1
        fluxfire.restore(pipe)
        assert np.array_equal(edit(pipe), expected)


@pytest.mark.parametrize("way", ["keep it", "apply again", "fuse"])
def test_a_lora_that_comes_later(pipe, way):
    """It is quantized with the weights, and that as if it had been there first."""
    expected = edit(with_lora(tiny_kontext()))
    before = edit(fluxfire.optimize(pipe, [Float8()]))
    with_lora(pipe)
    if way == "fuse":
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    if way == "apply again":
        fluxfire.restore(pipe)
        assert np.array_equal(edit(pipe), expected)
        fluxfire.optimize(pipe, [Float8()])
    assert 0 < np.abs(edit(pipe) - expected).max() < 0.01
    if way != "fuse":
        pipe.unload_lora_weights()
        assert np.array_equal(edit(pipe), before)


def test_hooks(pipe):
    """A hook runs if the layer is called, and is refused by name if it is not."""
    block = pipe.transformer.single_transformer_blocks[0]
    block.attn.to_q.register_forward_hook(lambda *_: None)
    fluxfire.optimize(pipe, [Float8(), FusedBlocks()])
    assert "single_transformer_blocks.0.attn.to_qkv" not in quantized(pipe)
    before = edit(pipe)
    hook = block.proj_mlp.register_forward_hook(lambda _, inputs, out: out * 0.5)
    assert np.abs(edit(pipe) - before).max() > 1e-3
    hook.remove()
    assert np.array_equal(edit(pipe), before)
    pipe.transformer.transformer_blocks[0].attn.add_k_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(FluxfireError, match="0.attn.add_k_proj has a hook that came after Float8"):
        edit(pipe)


def test_offloading_that_comes_later_is_refused(pipe):
    from accelerate import cpu_offload

    fluxfire.optimize(pipe, [Float8()])
    cpu_offload(pipe.transformer, torch.device("cpu"))
    with pytest.raises(FluxfireError, match=r"to_q has a hook .* \(offloading was enabled\?\)"):
        edit(pipe)


def refusals(*args, **kwargs):
    return [str(finding) for finding in found(*args, **kwargs) if finding.level == "error"]


def found(pass_, pipe, traits=frozenset(), **facts):
    environment = Environment(
        "3.12", {}, "13.0", **{"gpu": "NVIDIA A100", "capability": (8, 0), "gpu_bytes": 1, **facts}
    )
    return list(pass_.check(Target(pipe, environment, traits=frozenset(traits))))


def test_refusals(pipe):
    with pytest.raises(ValueError, match="originals='keep'; it must be one of host, drop"):
        Float8("keep")
    assert refusals(Float8(), pipe, ["fused-qkv", "quantized", "sequential-offload"]) == [
        "the projections are fused already; leave the fusion out: Float8 fuses",
        "the weights are quantized already; use one quantization",
        (
            "offloading moves the weights while the pipeline runs (sequential-offload); "
            "Float8 halves them, and Placement() places the rest: take the offloading off"
        ),
    ]
    with pytest.raises(PlanError, match="float8: the projections are fused already"):
        fluxfire.optimize(pipe, [QKVFusion(), Float8()])


def test_a_gpu_without_float8_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.transformer), "device", torch.device("cuda"))
    why = "NVIDIA A100 has compute capability 8.0, and float8 products need 8.9"
    assert refusals(Float8(), pipe) == [f"{why}; use Int8() in its place"]
    assert refusals(Float8(), pipe, gpu="NVIDIA H100", capability=(9, 0)) == []


def test_casts_leave_float8_alone(pipe):
    fluxfire.optimize(pipe, [Float8()])
    product = pipe.transformer.single_transformer_blocks[0].proj_mlp.product
    weight = product.weight.float()
    pipe.to(torch.bfloat16)
    assert product.weight.dtype is E4M3
    assert torch.equal(product.weight.float(), weight)
    assert product.bias.dtype is torch.bfloat16
    assert product.scale.dtype is torch.float32
    assert edit(pipe).dtype.kind == "f"


def test_behind_fused_blocks_rows_are_rounded_where_they_are_made(reference):
    alone = edit(fluxfire.optimize(tiny_kontext(), [Float8()]))
    fused = edit(fluxfire.optimize(tiny_kontext(), [Float8(), FusedBlocks()]))
    assert np.abs(fused - alone).max() < 0.01
    assert 0 < np.abs(fused - reference).max() < 0.1


@pytest.mark.slow
def test_sparks_edits_stay():
    pipe, edits = spark.load(dtype=torch.float32), spark.examples(split="test", n=6)
    plain = spark.score(pipe, edits, steps=10)
    with fluxfire.optimized(pipe, [Float8()]):
        made = spark.score(pipe, edits, steps=10)
    assert sum(m.passed for m in made) >= sum(p.passed for p in plain) - 1
    near = compare([m.image for m in made], [p.image for p in plain]).to_dict()
    # Not the worst: where an edit leaves a ground open, rounding may lead to another one.
    assert median(one["psnr"] for one in near["each"]) > 33


@pytest.mark.slow
def test_a_block_stays_one_graph():
    pipe = tiny_kontext()
    fluxfire.optimize(pipe, [Float8()])
    plain = edit(pipe)
    fluxfire.optimize(pipe, [FusedBlocks(), Compile()])
    assert np.abs(edit(pipe) - plain).max() < 0.01
    assert fluxfire.report(pipe).runs[-1].graph_breaks == 0


def test_offloading_beside_a_lora_on_every_projection():
    """Then no product is fused, whose hooks would raise the error."""
    plain, pipe = (
        with_lora(tiny_kontext()),
        fluxfire.optimize(with_lora(tiny_kontext()), [Float8()]),
    )
    edit(pipe, steps=1)
    for each in (plain, pipe):
        accelerate.cpu_offload(each.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(FluxfireError, match="offloading was enabled"):
        edit(pipe, steps=1)
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe, steps=1), edit(plain, steps=1))
