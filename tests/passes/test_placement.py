"""Where the parts of a pipeline lie, on an emulated second device."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

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


def with_t5_adapter(pipe):
    config = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        inject_adapter_in_model(config, pipe.text_encoder_2)


LATER = [(load, [THERE]), (load, LOW_MEMORY), (with_t5_adapter, [THERE])]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("adapt", "passes"), LATER, ids=["plain", "int8", "t5"])
def test_an_adapter_that_comes_later_goes_back_with_the_weights(adapt, passes, streamed):
    pipe, twin = tiny_kontext(), tiny_kontext()
    if streamed:
        passes = [replace(passes[0], memory=ROOM), *passes[1:]]
    fluxfire.optimize(pipe, passes)
    edit(pipe)
    for one in (pipe, twin):
        adapt(one)
    made = edit(pipe)
    copied = copy.deepcopy(pipe)
    fluxfire.restore(pipe)
    plain = edit(twin)
    assert {*places(pipe).values()} == {*places(copied).values()} == {torch.device("cpu")}
    assert np.array_equal(edit(pipe), plain)
    assert np.array_equal(edit(copied), plain)
    assert np.abs(made - plain).max() < (2e-5 if passes[1:] == [] else 0.1)


def test_a_pipeline_on_the_device_comes_back_to_it(reference):
    """Also what had to leave it, since the memory does not hold all."""
    pipe = tiny_kontext().to(DEVICE)
    fluxfire.optimize(pipe, [Placement(device=str(DEVICE), memory=ROOM)])
    assert np.array_equal(edit(pipe), reference)
    assert fluxfire.report(pipe).passes[0].facts["streamed_layers"] > 0
    fluxfire.restore(pipe)
    assert {*places(pipe).values()} == {DEVICE}
    assert np.array_equal(edit(pipe), reference)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_a_part_that_another_pipeline_has_placed_is_refused(part, reference):
    one, two = tiny_kontext(), tiny_kontext()
    two.register_modules(**{part: getattr(one, part)})
    fluxfire.optimize(one, [THERE])
    others = [[THERE]] + ([[Int8TextEncoder()]] if part == "text_encoder_2" else [])
    for passes in others:
        with pytest.raises(PlanError, match="shares the .* decides where it lies; restore"):
            fluxfire.optimize(two, passes)
    fluxfire.restore(one)
    fluxfire.optimize(two, [THERE])
    assert np.array_equal(edit(two), reference)
    fluxfire.restore(two)
    assert np.array_equal(edit(one), reference)


def test_weights_that_are_loaded_go_back_with_the_others(tmp_path):
    tiny_kontext().save_pretrained(tmp_path / "plain")
    fluxfire.quantize(str(tmp_path / "plain"), tmp_path / "int8", dtype=torch.float32)
    pipe = fluxfire.load(str(tmp_path / "int8"), dtype=torch.float32)
    other = tiny_kontext(seed=1).transformer.state_dict()
    fluxfire.optimize(pipe, [THERE])
    edit(pipe)
    pipe.transformer.load_state_dict(other)
    made = edit(pipe)
    fluxfire.restore(pipe)
    assert {*places(pipe).values()} <= {torch.device("cpu")}
    assert np.array_equal(edit(pipe), made)


def test_a_device_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="device='gpu' is no device"):
        Placement(device="gpu")


def test_silencing_a_warning_is_no_move(pipe):
    fluxfire.optimize(pipe, [THERE])
    pipe.to(torch.bfloat16, silence_dtype_warnings=True)
    assert edit(pipe).shape[-1] == 3
