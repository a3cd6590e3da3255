"""`memory=`: which passes make a pipeline fit, and that it does."""

from __future__ import annotations

import numpy as np
import pytest

import fluxfire
from fluxfire.errors import PlanError
from fluxfire.passes import Float8, FusedBlocks, ModulationTable, Placement, QKVFusion
from fluxfire.passes.placement import ROOM
from fluxfire.planning.memory import fit, measure
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
        less - 1: ["placement", "float8", "modulation-table", "fused-blocks"],
    }
    for memory, passes in wanted.items():
        assert names(fit(pipe, [FusedBlocks()], memory)) == passes
        plan = fluxfire.plan(pipe, [FusedBlocks()], memory=memory)
        assert names(step.pass_ for step in plan.steps) == passes
        assert plan.ok


def test_what_the_list_says_is_kept(pipe):
    given = [Placement(tiling=False), Float8("drop"), ModulationTable()]
    made = fit(pipe, given, ROOM)
    assert made == [Placement(tiling=False, memory=ROOM), *given[1:]]
    assert names(fit(pipe, "low_memory", "12GiB")) == names(fluxfire.presets.low_memory)


def test_a_slot_that_is_filled_is_left(pipe):
    class Quantizes:
        name, stage, slot, exactness = "quantizes", "weights", "quantization", "lossy"

        def check(self, target):
            return ()

        def apply(self, tx):
            raise NotImplementedError

    assert "float8" not in names(fit(pipe, [Quantizes()], ROOM))


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
