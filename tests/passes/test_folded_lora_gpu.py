"""A folded LoRA on a GPU, where the original weights and the adapters wait in host memory.

Each thing is done to a plain twin, too; the pictures agree after each.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fluxfire
from fluxfire.passes import Float8, FoldedLora, FusedBlocks, ModulationTable
from fluxfire.testing import edit, tiny_kontext
from passes.test_folded_lora import INSIDE, OUTSIDE, apart, load
from test_later import adapter

pytestmark = pytest.mark.gpu
LISTS = {
    "bf16": [FoldedLora(), FusedBlocks()],
    "table on the host": [FoldedLora(), FusedBlocks(), ModulationTable(host=True)],
    "float8": [Float8(), FusedBlocks()],
}
each_list = pytest.mark.parametrize("passes", LISTS)


def on_gpu():
    return tiny_kontext(device="cuda")


def near(pipe, twin, passes):
    return apart(edit(pipe, steps=1), edit(twin, steps=1)) < (0.05 if passes == "float8" else 1e-3)


@each_list
def test_whatever_is_done(passes):
    twin, pipe = on_gpu(), fluxfire.optimize(on_gpu(), LISTS[passes])
    assert near(pipe, twin, passes)
    for do in (
        lambda one: load(one, layers=INSIDE + OUTSIDE),
        lambda one: one.set_adapters(["style"], [0.5]),
        lambda one: load(one, "other", rank=2, seed=4),
        lambda one: one.set_adapters(["style", "other"], [1.0, 0.5]),
        lambda one: one.to("cuda"),
        lambda one: one.transformer.fuse_lora(),
        lambda one: one.transformer.unfuse_lora(),
        lambda one: one.delete_adapters("style"),
        lambda one: one.unload_lora_weights(),
        lambda one: load(one, "third", ["to_q", "proj_mlp"], seed=9),
    ):
        do(twin)
        do(pipe)
        assert near(pipe, twin, passes)
    fluxfire.restore(pipe)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cuda"}
    assert near(pipe, twin, passes)


@each_list
def test_loaded_later_and_applied_again(passes):
    twin, pipe = on_gpu(), fluxfire.optimize(on_gpu(), LISTS[passes])
    edit(pipe, steps=1)
    for one in (twin, pipe):
        load(one)
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe, steps=1), edit(twin, steps=1))
    fluxfire.optimize(pipe, LISTS[passes])
    assert near(pipe, twin, passes)


def test_what_cannot_be_folded_takes_the_place_of_what_could():
    twin, pipe = on_gpu(), fluxfire.optimize(on_gpu(), LISTS["bf16"])
    for one in (twin, pipe):
        load(one)
        edit(one, steps=1)
        one.unload_lora_weights()
        load(one, use_dora=True)
    assert near(pipe, twin, "bf16")


@each_list
def test_swapped_in_place_and_fused(passes):
    twin, pipe = on_gpu(), fluxfire.optimize(on_gpu(), LISTS[passes])
    for one in (twin, pipe):
        one.transformer.enable_lora_hotswap(target_rank=4)
    for swap, rank in ((False, 2), (True, 4)):
        for one in (twin, pipe):
            one.transformer.load_lora_adapter(
                adapter(one.transformer, rank), adapter_name="default", hotswap=swap
            )
        assert near(pipe, twin, passes)
    for one in (twin, pipe):
        one.transformer.fuse_lora()
    assert near(pipe, twin, passes)


def test_the_originals_are_away_and_come_back():
    pipe = on_gpu()
    load(pipe)
    before = {k: v.cpu().clone() for k, v in pipe.transformer.state_dict().items()}
    fluxfire.optimize(pipe, LISTS["bf16"])
    edit(pipe, steps=1)
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    assert layer.base_layer.weight.is_pinned()
    assert layer.lora_A["style"].weight.is_pinned()
    assert layer.base_layer.folded.is_cuda
    pipe.to("cuda")
    assert not layer.base_layer.weight.is_cuda
    fluxfire.restore(pipe)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[k].cpu(), before[k]) for k in before)
    assert {v.device.type for v in after.values()} == {"cuda"}
