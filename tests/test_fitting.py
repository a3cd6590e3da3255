"""`memory=`: which passes make a pipeline fit, and that it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fluxfire
from fluxfire.errors import PlanError
from fluxfire.kontext.random_weights import full_kontext
from fluxfire.passes import FusedBlocks, Int8, ModulationTable, Placement, QKVFusion
from fluxfire.passes.contrib.placement import ROOM
from fluxfire.planning.memory import advise, fit, measure
from fluxfire.testing import edit, tiny_kontext
from other_device import DEVICE, OtherDevice


def names(passes):
    return [p if isinstance(p, str) else p.name for p in passes]


@pytest.fixture
def sizes(pipe):
    return measure(pipe)


def test_the_parts_are_the_whole(pipe, sizes):
    whole = sum(
        w.nbytes
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        for w in {*part.parameters(), *part.buffers()}
    )
    assert sum(sizes) == whole
    assert min(sizes) > 0


def test_as_little_as_possible_is_added(pipe, sizes):
    enough = ROOM + sizes.rest + sizes.blocks + sizes.modulations
    less = enough - sizes.modulations
    wanted = {
        "auto": ["placement", "fused-blocks"],
        enough: ["placement", "fused-blocks"],
        enough - 1: ["placement", "modulation-table", "fused-blocks"],
        less: ["placement", "modulation-table", "fused-blocks"],
        less - 1: ["placement", "int8", "modulation-table", "fused-blocks"],
    }
    for memory, passes in wanted.items():
        assert names(fit(pipe, [FusedBlocks()], memory)) == passes
        plan = fluxfire.plan(pipe, [FusedBlocks()], memory=memory)
        assert names(step.pass_ for step in plan.steps) == passes
        assert plan.ok


def test_what_the_list_says_is_kept(pipe):
    given = [Placement(tiling=False), Int8("drop"), ModulationTable()]
    made = fit(pipe, given, ROOM)
    assert made == [Placement(tiling=False, memory=ROOM), *given[1:]]
    assert names(fit(pipe, "faithful", ROOM)) == [
        *("placement", "inductor-patch", "int8", "modulation-table", "fused-blocks", "compile")
    ]


def test_a_slot_that_is_filled_is_left(pipe):
    class Quantizes:
        name, stage, slot, exactness = "quantizes", "weights", "quantization", "lossy"

        def check(self, target):
            return ()

        def apply(self, tx):
            raise NotImplementedError

    assert "int8" not in names(fit(pipe, [Quantizes()], ROOM))


@pytest.mark.parametrize("memory", ["much", "-1GiB", 0, "12 gib b"])
def test_what_is_no_amount_is_refused_before_anything_changes(pipe, memory):
    with pytest.raises(PlanError, match="no amount of memory.*'auto'"):
        fluxfire.optimize(pipe, memory=memory)
    assert fluxfire.report(pipe).passes == ()


def test_mistakes_in_the_list_are_told_as_without_memory(pipe):
    with pytest.raises(PlanError, match="there is no pass 'flaot8'"):
        fluxfire.optimize(pipe, ["flaot8"], memory="12GiB")
    with pytest.raises(PlanError, match="not on object"):
        fluxfire.optimize(object(), [QKVFusion()], memory="12GiB")


def test_the_pipeline_stays_within_its_memory(reference):
    with OtherDevice():
        pipe = tiny_kontext()
        sizes = measure(pipe)
        memory = ROOM + sizes.rest + sizes.blocks // 2
        there = Placement(device=str(DEVICE))
        fluxfire.optimize(pipe, [there, FusedBlocks()], memory=memory)
        made = edit(pipe)
        used = fluxfire.report(pipe).passes[0].facts["on_device"]
        parts = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
        tensors = {t for part in parts for t in (*part.parameters(), *part.buffers())}
        there_now = sum(t.nbytes for t in tensors if t.device == DEVICE)
        assert there_now <= memory - ROOM
        assert used.endswith("KiB")
        fluxfire.restore(pipe)
        assert 0 < np.abs(made - reference).max() < 0.1
        assert np.array_equal(edit(pipe), reference)


def test_load_places_what_it_loads(tmp_path):
    tiny_kontext().save_pretrained(tmp_path)
    pipe = fluxfire.load(str(tmp_path), memory="auto")
    assert "placement" in names(fluxfire.report(pipe).passes)
    fluxfire.restore(pipe)


@pytest.mark.parametrize(("gib", "words"), [
    (80, "fits as a whole"),
    (31.5, "adds Placement(): nothing lossy"),
    (23.5, "adds Placement(), ModulationTable(host=True): nothing lossy"),
    (15.5, "adds Placement(), Int8(), ModulationTable(host=True): lossy"),
    (11.5, "adds Placement(), Int8(), ModulationTable(host=True): lossy"),
    (8, "does not fit: fluxfire needs 11.0 GiB"),
])  # fmt: skip
def test_the_advice_for_a_card_is_that_of_kontexts_sizes(gib, words):
    assert words in advise(full_kontext(device="meta"), gib * 2**30)


def test_out_of_memory_names_what_would_fit(pipe):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    fluxfire.optimize(pipe, [FusedBlocks()])
    pipe.vae.decode = out_of_memory
    with pytest.raises(torch.OutOfMemoryError) as caught:
        edit(pipe)
    assert 'optimize(pipe, memory="auto")' in caught.value.__notes__[0]
    del pipe.vae.decode
    edit(pipe)


def test_an_int8_checkpoint_counts_what_it_takes(tmp_path):
    """And not the weights that it stands for."""
    tiny_kontext(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    fluxfire.quantize(str(tmp_path / "plain"), tmp_path / "int8")
    pipe = fluxfire.load(str(tmp_path / "int8"), dtype=torch.bfloat16)
    tensors = {
        t
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        for t in (*part.parameters(), *part.buffers())
        if not t.is_meta
    }
    real = sum(t.nbytes for t in tensors)
    assert sum(measure(pipe)) == real
    assert names(fit(pipe, [], ROOM + real)) == ["placement"]
    with OtherDevice():
        fluxfire.optimize(pipe, [Placement(device=str(DEVICE), memory=ROOM + real)])
        edit(pipe)
        assert fluxfire.report(pipe).passes[0].facts["streamed_layers"] == 0
        assert sum(t.nbytes for t in tensors if t.device == DEVICE) == real
        fluxfire.restore(pipe)
        assert {t.device.type for t in tensors} == {"cpu"}


def test_a_megapixel_needs_no_tiles_beside_the_text_encoder(pipe):
    """The room for the VAE is left free when T5 is placed."""
    sizes, plain, tiled = measure(pipe), pipe.vae._decode, []

    def decode(latents, *rest):
        tiled.append(pipe.vae.use_tiling)
        return plain(latents, *rest) if latents.shape[-1] < 512 else latents

    pipe.vae._decode = decode
    with OtherDevice():
        for memory in (ROOM + sum(sizes) - sizes.text // 2, ROOM + sum(sizes)):
            fluxfire.optimize(pipe, [Placement(device=str(DEVICE), memory=memory)])
            edit(pipe)
            latents = torch.empty(1, 4, 512, 512, dtype=torch.bfloat16)
            pipe.vae._decode(latents)  # 1024 x 1024 pixels
            pipe.vae._decode(latents.expand(2, -1, -1, -1))
            pipe.vae.enable_slicing()
            pipe.vae._decode(latents.expand(2, -1, -1, -1))
            pipe.vae.disable_slicing()
            fluxfire.restore(pipe)
    assert tiled == [False, False, True, False] * 2


def test_a_placement_of_ones_own_keeps_its_memory(pipe):
    made = fit(pipe, [Placement(memory=ROOM)], "auto")
    assert Placement(memory=ROOM) in made
    assert names(made) == ["placement", "int8", "modulation-table"]
