"""Where the parts of a pipeline lie, on an emulated second device."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

import fluxfire
from fluxfire import modules
from fluxfire.errors import FluxfireError, PassError, PlanError
from fluxfire.passes import (
    EncodingCache,
    FoldedLora,
    FusedBlocks,
    Int8,
    Int8TextEncoder,
    ModulationTable,
    Placement,
)
from fluxfire.passes.contrib.placement import ROOM
from fluxfire.supported import model_of
from fluxfire.testing import edit, tiny_kontext
from fluxfire.text import read_bytes
from other_device import DEVICE, OtherDevice
from passes.test_folded_lora import load

THERE = Placement(device=str(DEVICE))
LOW_MEMORY = (THERE, Int8(), Int8TextEncoder(), ModulationTable(host=True), FusedBlocks())


@pytest.fixture(autouse=True)
def other_device():
    with OtherDevice() as mode:
        yield mode


def named_tensors(pipe):
    for name, component in modules.components(pipe):
        tensors = itertools.chain(component.named_parameters(), component.named_buffers())
        yield from ((f"{name}.{path}", tensor) for path, tensor in tensors)


def places(pipe):
    return {name: tensor.device for name, tensor in named_tensors(pipe)}


def bits(pipe):
    return {name: tensor.clone() for name, tensor in named_tensors(pipe)}


def large_weights(pipe):
    model = model_of(pipe)
    blocks = model.blocks(pipe.transformer)
    own = [getattr(*at).weight for block in blocks for at in model.linears(block)]
    own += [norm.linear.weight for b in blocks for norm in model.modulated_norms(b)]
    return own + [m.weight for m in pipe.text_encoder_2.modules() if isinstance(m, torch.nn.Linear)]


def test_all_is_on_the_device_after_an_edit_if_it_fits(pipe, reference):
    fluxfire.optimize(pipe, [THERE])
    assert np.array_equal(edit(pipe), reference)
    assert {*places(pipe).values()} == {DEVICE}
    assert "±0" in str(fluxfire.report(pipe))  # streamed


@pytest.mark.parametrize("kind", ["edit", "inpaint"])
def test_large_weights_never_leave_the_host(kind, other_device):
    """What other passes compute with in its place does, and the picture is the same."""
    pipe, twin = tiny_kontext(kind), tiny_kontext(kind)
    fluxfire.optimize(twin, LOW_MEMORY[1:])
    fluxfire.optimize(pipe, [Placement(device=str(DEVICE), memory=ROOM), *LOW_MEMORY[1:]])
    addresses = [weight.data_ptr() for weight in large_weights(pipe)]
    made = edit(pipe)
    assert np.array_equal(made, edit(twin))
    assert [weight.data_ptr() for weight in large_weights(pipe)] == addresses
    assert {weight.device.type for weight in large_weights(pipe)} == {"cpu"}


@pytest.mark.parametrize("passes", [[THERE], LOW_MEMORY, [THERE, FusedBlocks()]], ids=len)
@pytest.mark.parametrize("edits", [0, 1])
def test_restore_moves_everything_back(pipe, reference, passes, edits):
    before, numbers = places(pipe), bits(pipe)
    fluxfire.optimize(pipe, passes)
    for _ in range(edits):
        edit(pipe)
    fluxfire.restore(pipe)
    assert places(pipe) == before
    now = bits(pipe)
    assert all(torch.equal(numbers[name], now[name]) for name in numbers)
    assert not {"to", "enable_model_cpu_offload"} & {*vars(pipe)}
    assert np.array_equal(edit(pipe), reference)


@pytest.mark.parametrize("encoder", [(), (Int8TextEncoder(),)], ids=["plain", "int8"])
def test_the_text_encoder_moves_layer_by_layer_as_far_as_there_is_room(encoder):
    pictures, streamed = [], []
    whole = tiny_kontext()
    fluxfire.optimize(whole, [THERE, *encoder])
    pictures.append(edit(whole))
    on_device = sum(tensor.nbytes for _, tensor in named_tensors(whole) if tensor.device == DEVICE)
    for part in (0.5, 0.0):
        pipe = tiny_kontext()
        encoders = [m for m in pipe.text_encoder_2.modules() if isinstance(m, torch.nn.Linear)]
        weights = sum(m.weight.nbytes for m in encoders) // (4 if encoder else 1)
        memory = ROOM + on_device - int((1 - part) * weights)
        fluxfire.optimize(pipe, [Placement(device=str(DEVICE), memory=memory), *encoder])
        pictures.append(edit(pipe))
        facts = fluxfire.report(pipe).passes[0].facts
        streamed.append(facts["streamed_layers"])
        used = sum(tensor.nbytes for _, tensor in named_tensors(pipe) if tensor.device == DEVICE)
        assert used <= memory - ROOM
    assert 0 < streamed[0] < streamed[1]
    assert all(np.array_equal(made, pictures[0]) for made in pictures)


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe.to(DEVICE),
        lambda pipe: pipe.to("cpu"),
        lambda pipe: pipe.to(device=DEVICE, dtype=torch.float32),
        lambda pipe: pipe.enable_model_cpu_offload(),
        lambda pipe: pipe.enable_sequential_cpu_offload(),
        lambda pipe: pipe.enable_group_offload(DEVICE),
    ],
)
def test_what_would_move_the_parts_is_refused(pipe, reference, call):
    fluxfire.optimize(pipe, [THERE])
    with pytest.raises(FluxfireError, match=r"restore\(pipe\) first"):
        call(pipe)
    assert np.array_equal(edit(pipe), reference)
    fluxfire.restore(pipe)


def test_a_dtype_can_change(pipe):
    fluxfire.optimize(pipe, [THERE])
    edit(pipe)
    pipe.to(torch.bfloat16)
    assert edit(pipe).shape[-1] == 3
    assert {tensor.dtype for _, tensor in named_tensors(pipe) if tensor.is_floating_point()} == {
        torch.bfloat16
    }


def test_a_pipeline_that_is_offloaded_is_refused(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.text_encoder_2, ModelHook())
    with pytest.raises(PlanError, match="text_encoder_2 has hooks that place it"):
        fluxfire.optimize(pipe, [THERE])


def test_tiles_are_those_of_diffusers_and_only_during_the_call():
    size = (64, 64)
    plain, tiled, pipe = tiny_kontext(), tiny_kontext(), tiny_kontext()
    tiled.vae.enable_tiling()
    whole, wanted = edit(plain, size), edit(tiled, size)
    assert not np.array_equal(whole, wanted)
    fluxfire.optimize(pipe, [Placement(device=str(DEVICE), tiling=True)])
    assert np.array_equal(edit(pipe, size), wanted)
    assert pipe.vae.use_tiling is False
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe, size), whole)


@pytest.mark.parametrize(("tiling", "memory", "tiled"), [
    (None, "1GiB", 0), (None, "1MiB", 2), (False, "1MiB", 0), (True, "1GiB", 2),
])  # fmt: skip
def test_the_vae_works_in_tiles_where_it_would_not_fit(pipe, tiling, memory, tiled):
    placement = Placement(device=str(DEVICE), tiling=tiling, memory=memory)
    assert placement.exactness == ("bitwise" if tiling is False else "lossy")
    fluxfire.optimize(pipe, [placement])
    edit(pipe, (64, 64))
    assert fluxfire.report(pipe).passes[0].facts["tiled"] == tiled


def test_known_prompts_and_pictures_are_still_cached(pipe, reference):
    memory = Placement(device=str(DEVICE), memory=ROOM, tiling=False)
    fluxfire.optimize(pipe, [memory, Int8TextEncoder(), EncodingCache()])
    first = edit(pipe)
    assert np.array_equal(edit(pipe), first)
    facts = fluxfire.report(pipe).passes[2].facts
    assert (facts["prompts_hits"], facts["pictures_hits"]) == (2, 1)


def test_a_later_pass_that_fails_leaves_the_pipeline_as_it_was(pipe):
    class Fails:
        name, stage, slot, exactness = "fails", "compile", None, "bitwise"

        def check(self, target):
            return ()

        def apply(self, tx):
            raise RuntimeError

    before = places(pipe)
    with pytest.raises(PassError):
        fluxfire.optimize(pipe, [*LOW_MEMORY, Fails()])
    assert places(pipe) == before


def test_a_copy_is_plain_and_lies_where_the_pipeline_lay(pipe, reference):
    before = places(pipe)
    fluxfire.optimize(pipe, LOW_MEMORY)
    edit(pipe)
    twin = copy.deepcopy(pipe)
    assert places(twin) == before
    assert np.array_equal(edit(twin), reference)


@pytest.mark.parametrize("passes", [
    [THERE], [THERE, FoldedLora()], [THERE, Int8(), ModulationTable(host=True)],
], ids=len)  # fmt: skip
@pytest.mark.parametrize("first", ["load", "optimize", "edit"])
def test_a_lora_lies_beside_the_weights(passes, first):
    twin, pipe = tiny_kontext(), tiny_kontext()
    fluxfire.optimize(twin, passes[1:])
    if first != "load":
        fluxfire.optimize(pipe, passes)
    if first == "edit":
        edit(pipe)
    for one in (twin, pipe):
        load(one)
    if first == "load":
        fluxfire.optimize(pipe, passes)
    assert np.abs(edit(pipe) - edit(twin)).max() < 2e-5


@pytest.mark.parametrize(("text", "number"), [
    ("16GiB", 16 * 2**30), ("16 GB", 16 * 10**9), ("512M", 512 * 2**20), ("1.5g", 3 * 2**29),
    (1000, 1000), ("2 TiB", 2**41), ("7", 7), ("8KB", 8000), ("3b", 3),
])  # fmt: skip
def test_memory_is_read(text, number):
    assert read_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1", "16 GBB", "16i", "0", 0, True, "1e9", "1.5.2g"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ValueError, match="no amount of memory"):
        Placement(memory=text)
