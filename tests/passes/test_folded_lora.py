"""A LoRA folded into the weights: PEFT's own pipeline is the oracle, in every state of the LoRA."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import accelerate
import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig

import fluxfire
from fluxfire.errors import FluxfireError
from fluxfire.passes import (
    Attention,
    FirstBlockCache,
    Float8,
    FoldedLora,
    FusedBlocks,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.passes.contrib import folded_lora
from fluxfire.passes.shared import adapters, eight_bits
from fluxfire.passes.shared.adapters import FoldedAdapter, FoldedLinear
from fluxfire.testing import edit, fingerprint, tiny_kontext
from test_interrupts import Interrupter
from test_later import adapter

CLOSE = 2e-5
INSIDE = [
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_out.0",
    "net.0.proj", "net.2", "proj_mlp", "single_transformer_blocks.0.proj_out",
    "single_transformer_blocks.1.proj_out", "single_transformer_blocks.2.proj_out",
]  # fmt: skip
OUTSIDE = ["x_embedder", "norm.linear", "norm1.linear", "linear_1", "context_embedder"]


def load(pipe, name="style", layers=INSIDE, *, rank=3, seed=3, config=LoraConfig, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config is LoraConfig:
            kwargs = {"init_lora_weights": False, **kwargs}
        pipe.transformer.add_adapter(
            config(r=rank, target_modules=list(layers), **kwargs), adapter_name=name
        )
        for where, weight in pipe.transformer.named_parameters():
            if f".{name}" in where:
                weight.data = (torch.randn(weight.shape) * 0.2).to(weight)


def two(pipe):
    load(pipe)
    load(pipe, "other", rank=2, seed=4)
    pipe.set_adapters(["style", "other"], [0.7, 1.3])


def each_in_turn(pipe):
    load(pipe)
    load(pipe, "other", ["to_q", "proj_mlp"], rank=2, seed=4)
    pipe.set_adapters(["other"])


STATES = {
    "one": load,
    "two, scaled": two,
    "the second of two": each_in_turn,
    "scaled": lambda pipe: (load(pipe), pipe.set_adapters(["style"], [0.3])),
    "switched off": lambda pipe: (load(pipe), pipe.transformer.disable_lora()),
    "one deleted": lambda pipe: (two(pipe), pipe.delete_adapters("style")),
    "fused": lambda pipe: (load(pipe), pipe.transformer.fuse_lora()),
    "unfused": lambda pipe: (
        load(pipe), pipe.transformer.fuse_lora(), pipe.transformer.unfuse_lora()
    ),
    "unloaded": lambda pipe: (load(pipe), pipe.unload_lora_weights()),
    "fused and unloaded": lambda pipe: (
        load(pipe), pipe.transformer.fuse_lora(), pipe.unload_lora_weights()
    ),
    "inside and outside": lambda pipe: load(pipe, layers=INSIDE + OUTSIDE),
    "outside alone": lambda pipe: load(pipe, layers=OUTSIDE),
    "projections alone": lambda pipe: load(pipe, layers=["to_q"]),
    "DoRA": lambda pipe: load(pipe, use_dora=True),
    "with biases": lambda pipe: load(pipe, lora_bias=True),
    "LoKr": lambda pipe: load(pipe, config=LoKrConfig),
    "LoHa": lambda pipe: load(pipe, config=LoHaConfig),
    "a LoRA and a DoRA": lambda pipe: (
        load(pipe, layers=["to_q", "proj_mlp"]), load(pipe, "other", ["to_q"], use_dora=True),
        pipe.set_adapters(["style", "other"]),
    ),
}  # fmt: skip
ALL_FOLDED = {"one", "two, scaled", "the second of two", "scaled", "switched off", "one deleted",
              "fused", "unfused", "projections alone"}  # fmt: skip
LISTS = {
    "alone": [FoldedLora()],
    "fused blocks": [FoldedLora(), FusedBlocks()],
    "table": [FoldedLora(), FusedBlocks(), ModulationTable()],
    "table on the host": [FoldedLora(), ModulationTable(host=True)],
    "one fused projection": [FoldedLora(), QKVFusion()],
    "caches": [FoldedLora(), Attention("_native_math"), ReferenceCache(0)],
    "block cache": [FoldedLora(), FirstBlockCache(0)],
}


def plain(do, **call):
    pipe = tiny_kontext()
    do(pipe)
    return edit(pipe, steps=1, **call)


def folded(pipe):
    return {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, FoldedAdapter)
    }


def apart(one, other):
    return float(np.abs(one - other).max())


def test_every_state_but_none_shows_in_the_picture():
    without = plain(lambda pipe: None)
    for name, do in STATES.items():
        shows = apart(plain(do), without) > 100 * CLOSE
        assert shows == (name not in {"switched off", "unloaded"}), name


# All states with all lists take three minutes.
PAIRS = [
    (passes, state)
    for row, passes in enumerate(LISTS)
    for column, state in enumerate(STATES)
    if passes == "fused blocks" or (row + column) % 5 == 0
]


@pytest.mark.parametrize(("passes", "state"), PAIRS)
def test_before_and_after(passes, state):
    do = STATES[state]
    expected, without = plain(do), plain(lambda pipe: None)
    before, after = tiny_kontext(), tiny_kontext()
    do(before)
    fluxfire.optimize(before, LISTS[passes])
    assert apart(edit(before, steps=1), expected) < CLOSE
    fluxfire.optimize(after, LISTS[passes])
    assert apart(edit(after, steps=1), without) < CLOSE
    do(after)
    assert apart(edit(after, steps=1), expected) < CLOSE
    twin = tiny_kontext()
    do(twin)
    for pipe in (before, after):
        fluxfire.restore(pipe)
        state_dict, plain_dict = pipe.transformer.state_dict(), twin.transformer.state_dict()
        assert all(torch.equal(state_dict[k], plain_dict[k]) for k in plain_dict)
        assert not any(isinstance(m, FoldedLinear) for m in pipe.transformer.modules())
        assert not folded(pipe)
        assert np.array_equal(edit(pipe, steps=1), edit(twin, steps=1))


@pytest.mark.parametrize("state", sorted(ALL_FOLDED))
def test_folded_layers_call_no_adapter(state):
    """Else the pass would gain nothing."""
    pipe = tiny_kontext()
    STATES[state](pipe)
    fluxfire.optimize(pipe, [FoldedLora(), FusedBlocks()])
    calls = []

    class Counted(torch.nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    for name, module in pipe.transformer.named_modules():
        if "lora_A" in name and isinstance(module, torch.nn.Linear):
            module.__class__ = Counted
    edit(pipe, steps=1)
    assert not calls
    layers = {
        name
        for name, m in pipe.transformer.named_modules()
        if hasattr(type(m), "adapter_layer_names")
    }
    assert folded(pipe) == layers
    (done,) = (p for p in fluxfire.report(pipe).passes if p.name == "folded-lora")
    assert done.facts == {"folded": len(layers), "left to PEFT": 0}


@pytest.mark.parametrize("state", ["DoRA", "LoKr", "LoHa", "with biases", "outside alone"])
def test_what_cannot_be_folded_is_counted(state):
    pipe = tiny_kontext()
    STATES[state](pipe)
    fluxfire.optimize(pipe, [FoldedLora()])
    edit(pipe, steps=1)
    (done,) = fluxfire.report(pipe).passes
    assert done.facts["folded"] == 0 < done.facts["left to PEFT"]
    assert not folded(pipe)


PASSES = {"bf16": [FoldedLora(), FusedBlocks()], "float8": [Float8(), FusedBlocks()]}


def now(pipe, passes):
    """What the passes make of a plain copy of the pipeline as it is now."""
    twin = copy.deepcopy(pipe)
    assert type(twin) is type(tiny_kontext())
    if passes == "bf16":
        return edit(twin, steps=1)
    return edit(fluxfire.optimize(twin, PASSES[passes]), steps=1)


@pytest.mark.parametrize("passes", PASSES)
def test_one_pipeline_follows_everything(passes):
    pipe = fluxfire.optimize(tiny_kontext(), PASSES[passes])
    pictures = []
    for do in (
        lambda: None,
        lambda: load(pipe),
        lambda: pipe.set_adapters(["style"], [0.4]),
        lambda: load(pipe, "other", rank=2, seed=4),
        lambda: pipe.set_adapters(["style", "other"], [1.0, 0.5]),
        pipe.transformer.disable_lora,
        pipe.transformer.enable_lora,
        lambda: pipe.delete_adapters("style"),
        pipe.transformer.fuse_lora,
        pipe.transformer.unfuse_lora,
        pipe.unload_lora_weights,
        lambda: load(pipe, "third", ["to_q", "proj_out"], seed=9),
    ):
        do()
        made = edit(pipe, steps=1)
        assert apart(made, now(pipe, passes)) <= (CLOSE if passes == "bf16" else 0)
        pictures.append(made)
    assert apart(pictures[0], pictures[1]) > 100 * CLOSE
    same = {(0, 5), (0, 10), (4, 6), (7, 8), (7, 9), (8, 9), (5, 10)}
    for i, one in enumerate(pictures):
        for j in range(i):
            assert (apart(one, pictures[j]) < 0.02) == ((j, i) in same) or passes == "float8", (
                j,
                i,
            )


def asked_first(passes, call):
    """What a new pipeline makes of a call: a plain one, or one with Float8."""
    pipe = tiny_kontext()
    load(pipe)
    if passes == "float8":
        fluxfire.optimize(pipe, PASSES[passes])
    return edit(pipe, steps=1, **call)


@pytest.mark.parametrize("passes", PASSES)
def test_the_scale_of_a_call(passes):
    pipe = tiny_kontext()
    load(pipe)
    fluxfire.optimize(pipe, PASSES[passes])
    bound = CLOSE if passes == "bf16" else 1e-6
    for scale in (0.8, 0.8, 0.0, 1.0, -0.5):
        call = {"joint_attention_kwargs": {"scale": scale}}
        assert apart(edit(pipe, steps=1, **call), asked_first(passes, call)) < bound, scale
    assert apart(edit(pipe, steps=1), asked_first(passes, {})) < bound


def test_the_scale_of_a_call_does_not_fold_again(monkeypatch):
    """diffusers multiplies the scalings and divides them, and 0.7 · 0.3 / 0.3 is not 0.7."""
    counted = []
    monkeypatch.setattr(
        folded_lora,
        "folded_weight",
        lambda *args: counted.append(1) or adapters.folded_weight(*args),
    )
    pipe = tiny_kontext()
    load(pipe)
    pipe.set_adapters(["style"], [0.7])
    fluxfire.optimize(pipe, [FoldedLora()])
    call = {"joint_attention_kwargs": {"scale": 0.3}}
    edit(pipe, steps=2, **call)
    first = len(counted)
    for _ in range(4):
        edit(pipe, steps=2, **call)
    assert len(counted) == first > 0


def test_a_step_callback_changes_the_adapter():
    def callback(pipe, step, timestep, kwargs):
        if step == 0:
            pipe.set_adapters(["style"], [0.2])
        return kwargs

    def pictures(passes):
        pipe = tiny_kontext()
        load(pipe)
        if passes:
            fluxfire.optimize(pipe, passes)
        return edit(pipe, steps=3, callback_on_step_end=callback)

    expected = pictures(None)
    assert apart(pictures([FoldedLora(), FusedBlocks()]), expected) < CLOSE
    assert apart(expected, edit(tiny_kontext(), steps=3)) > 100 * CLOSE


@pytest.mark.parametrize("passes", PASSES)
def test_swapped_in_place(passes):
    """As `load_lora_weights(…, hotswap=True)` does, with ranks padded to the largest."""
    pipe = fluxfire.optimize(tiny_kontext(), PASSES[passes])
    pipe.transformer.enable_lora_hotswap(target_rank=4)
    pictures = []
    for swap, rank in ((False, 2), (True, 4), (True, 3)):
        pipe.transformer.load_lora_adapter(
            adapter(pipe.transformer, rank), adapter_name="default", hotswap=swap
        )
        twin = tiny_kontext()
        twin.transformer.load_lora_adapter(adapter(twin.transformer, rank), adapter_name="default")
        expected = edit(twin, steps=1)
        if passes == "float8":
            expected = edit(fluxfire.optimize(twin, PASSES[passes]), steps=1)
        pictures.append(edit(pipe, steps=1))
        assert apart(pictures[-1], expected) < CLOSE
    assert apart(pictures[0], pictures[1]) > CLOSE


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_those_of_the_plain_pipeline(passes, frozen):
    def gradients(optimize):
        pipe = tiny_kontext()
        load(pipe)
        pipe.transformer.requires_grad_(not frozen)
        for name, weight in pipe.transformer.named_parameters():
            if "lora_" in name:
                weight.requires_grad_(True)
        if optimize:
            fluxfire.optimize(pipe, PASSES[passes])
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 6, pipe.transformer.config.in_channels, generator=generator)
        x.requires_grad_(True)
        text = torch.randn(1, 5, pipe.transformer.config.joint_attention_dim, generator=generator)
        out = pipe.transformer(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=torch.ones(1, pipe.transformer.config.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([2.5]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
        out.square().sum().backward()
        wanted = {n: p.grad for n, p in pipe.transformer.named_parameters() if p.requires_grad}
        return {"x": x.grad, **wanted}

    expected, made = gradients(False), gradients(True)
    assert expected.keys() == made.keys()
    bound = 1e-4 if passes == "bf16" else 0.35  # missing or doubled gradients would be off by 1
    for name, grad in expected.items():
        if grad is None:
            assert made[name] is None, name
            continue
        assert (made[name] - grad).norm() <= bound * grad.norm() + 1e-6, name


@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_offloading_folds_nothing(when):
    pipe = tiny_kontext()
    load(pipe)
    if when == "before":
        accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    fluxfire.optimize(pipe, [FoldedLora()])
    if when == "between":
        edit(pipe, steps=1)
        assert folded(pipe)
    if when != "before":
        accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    assert apart(edit(pipe, steps=1), plain(load)) < CLOSE
    assert not folded(pipe)


def test_sixteen_bits_round_once():
    """The folded weight is the float32 sum, rounded: not a sum of rounded numbers."""
    pipe = tiny_kontext()
    load(pipe)
    pipe.to(torch.bfloat16)
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    fluxfire.optimize(pipe, [FoldedLora()])
    edit(pipe, steps=1)
    a, b = layer.lora_A["style"].weight, layer.lora_B["style"].weight
    exact = layer.base_layer.weight.double() + layer.scaling["style"] * (b.double() @ a.double())
    # float32 and float64 round a few numbers otherwise; rounded parts would sum to many others.
    differ = layer.base_layer.folded != exact.to(torch.bfloat16)
    assert differ.float().mean() < 0.01
    parts = layer.base_layer.weight + (layer.scaling["style"] * (b @ a)).to(torch.bfloat16)
    assert (parts != exact.to(torch.bfloat16)).float().mean() > 0.05


def test_files_have_the_original_weights(tmp_path):
    pipe = tiny_kontext()
    load(pipe)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    fluxfire.optimize(pipe, [FoldedLora()])
    edit(pipe, steps=1)
    after = pipe.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_two_pipelines_share_the_transformer():
    pipe, other = tiny_kontext(), tiny_kontext()
    other.register_modules(transformer=pipe.transformer)
    load(pipe)
    fluxfire.optimize(pipe, [FoldedLora()])
    expected = plain(load)
    assert apart(edit(other, steps=1), expected) < CLOSE
    assert apart(edit(pipe, steps=1), expected) < CLOSE
    pipe.set_adapters(["style"], [0.5])
    expected = plain(lambda pipe: (load(pipe), pipe.set_adapters(["style"], [0.5])))
    assert apart(edit(other, steps=1), expected) < CLOSE
    call = {"joint_attention_kwargs": {"scale": 0.5}}
    assert apart(edit(other, steps=1, **call), plain(
        lambda pipe: (load(pipe), pipe.set_adapters(["style"], [0.25]))
    )) < CLOSE  # fmt: skip


def test_an_adapter_for_each_sample_is_refused():
    pipe = tiny_kontext()
    load(pipe)
    fluxfire.optimize(pipe, [FoldedLora()])
    edit(pipe, steps=1)
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    with torch.no_grad(), pytest.raises(FluxfireError, match="adapter_names"):
        layer(torch.zeros(2, 3, layer.in_features), adapter_names=["style", "__base__"])


def test_nothing_is_kept_after_restore():
    pipe = tiny_kontext()
    before = fingerprint(pipe)
    fluxfire.optimize(pipe, [FoldedLora()])
    load(pipe)
    edit(pipe, steps=1)
    layer = weakref.ref(pipe.transformer.single_transformer_blocks[0].proj_mlp)
    pipe.unload_lora_weights()
    edit(pipe, steps=1)
    fluxfire.restore(pipe)
    gc.collect()
    assert layer() is None
    after = fingerprint(pipe)
    assert {n for n in before if "class " in n and before[n] != after.get(n)} == set()


def test_float8_refuses_what_it_cannot_fold():
    pipe = fluxfire.optimize(tiny_kontext(), [Float8()])
    edit(pipe, steps=1)
    load(pipe, use_dora=True)
    with pytest.raises(FluxfireError, match=r"has an adapter.*DoraLinearVariant.*restore\(pipe\)"):
        edit(pipe, steps=1)
    fluxfire.restore(pipe)
    fluxfire.optimize(pipe, [Float8()])
    dora = plain(STATES["DoRA"])
    assert apart(edit(pipe, steps=1), dora) < 0.02
    assert apart(dora, edit(tiny_kontext(), steps=1)) > 0.02


def test_float8_rounds_the_sum():
    """Not the weight and the LoRA apart."""
    pipe = tiny_kontext()
    load(pipe)
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    a, b = layer.lora_A["style"].weight, layer.lora_B["style"].weight
    total = layer.base_layer.weight + layer.scaling["style"] * (b @ a)
    fluxfire.optimize(pipe, [Float8()])
    edit(pipe, steps=1)
    product = layer.base_layer.product
    error = (product.dequantized(total) - total).abs().amax(dim=1)
    assert (error <= total.abs().amax(dim=1) / 448 * 16 * 1.01).all()  # half a step of e4m3


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("change", ["load", "unload", "scale"])
def test_an_interrupt_while_folding_leaves_no_half(passes, change):
    """The next generation folds again, and `restore` gives back the plain pipeline."""

    def changed():
        pipe = tiny_kontext()
        if change != "load":
            load(pipe)
        edit(fluxfire.optimize(pipe, PASSES[passes]), steps=1)
        if change == "unload":
            pipe.unload_lora_weights()
        elif change == "load":
            load(pipe)
        else:
            pipe.set_adapters(["style"], [0.4])
        return pipe

    pipe, bound = changed(), CLOSE if passes == "bf16" else 0
    expected, state = now(pipe, passes), copy.deepcopy(pipe.transformer).state_dict()
    with Interrupter() as whole:
        edit(pipe, steps=1)
    for at in random.Random(0).sample(range(whole.seen), 4):
        pipe = changed()
        with Interrupter(at):
            edit(pipe, steps=1)
        assert apart(edit(pipe, steps=1), expected) <= bound, at
        with Interrupter(at):
            edit(pipe, steps=1)
        fluxfire.restore(pipe)
        again = pipe.transformer.state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state), at


@pytest.mark.parametrize("passes", PASSES)
def test_an_interrupt_before_a_new_scale_is_folded(passes, monkeypatch):
    """The scale that counts is the one that is folded, not the one that was asked for."""
    pipe = tiny_kontext()
    load(pipe)
    edit(fluxfire.optimize(pipe, PASSES[passes]), steps=1)
    call = {"joint_attention_kwargs": {"scale": 0.2}}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        for module in (folded_lora, eight_bits):
            patched.setattr(module, "folded_weight", interrupted)
        with pytest.raises(KeyboardInterrupt):
            edit(pipe, steps=1, **call)
    assert apart(edit(pipe, steps=1, **call), asked_first(passes, call)) < CLOSE


@pytest.mark.parametrize("passes", PASSES)
def test_a_layer_in_two_places_with_the_lora_in_one(passes):
    """PEFT wraps the layer where it finds it first; the other place is without the LoRA."""

    def shared(pipe):
        first, second, *_ = pipe.transformer.single_transformer_blocks
        second.proj_mlp = first.proj_mlp
        load(pipe, layers=["single_transformer_blocks.0.proj_mlp"])

    pipe = tiny_kontext()
    shared(pipe)
    if passes == "float8":
        with pytest.raises(FluxfireError, match="stands in two places"):
            fluxfire.optimize(pipe, PASSES[passes])
        assert apart(edit(pipe, steps=1), plain(shared)) == 0  # nothing was changed
        return
    fluxfire.optimize(pipe, PASSES[passes])
    assert apart(edit(pipe, steps=1), plain(shared)) < CLOSE
    assert not folded(pipe)


def test_a_block_in_two_places_is_folded():
    def twice(pipe):
        blocks = pipe.transformer.single_transformer_blocks
        blocks.append(blocks[0])
        load(pipe, layers=["to_q", "proj_mlp"])

    pipe = tiny_kontext()
    twice(pipe)
    fluxfire.optimize(pipe, PASSES["bf16"])
    assert apart(edit(pipe, steps=1), plain(twice)) < CLOSE
    assert folded(pipe)


def test_a_cast_keeps_the_folded_weight_and_the_original_alike():
    pipe = tiny_kontext()
    load(pipe)
    fluxfire.optimize(pipe, [FoldedLora()])
    edit(pipe, steps=1)
    pipe.to(torch.bfloat16)
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    assert layer.base_layer.folded.dtype == layer.base_layer.weight.dtype == torch.bfloat16
    edit(pipe, steps=1)
    fluxfire.restore(pipe)
    twin = tiny_kontext()
    load(twin)
    twin.to(torch.bfloat16)
    assert np.array_equal(edit(pipe, steps=1), edit(twin, steps=1))


@pytest.mark.parametrize("passes", PASSES)
def test_folding_under_autocast_is_as_exact(passes):
    """What was folded in the block serves the edits after it."""
    pipe = tiny_kontext()
    load(pipe)
    fluxfire.optimize(pipe, PASSES[passes])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edit(pipe, steps=1)
    bound = CLOSE if passes == "bf16" else 0
    assert apart(edit(pipe, steps=1), asked_first(passes, {})) <= bound
