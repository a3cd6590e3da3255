"""PEFT while a pass keeps weights in host memory, on an emulated device.

PEFT adds an adapter to a weight, so both must be on the same device at any time, not only when the
pipeline runs. A plain twin on that device is the oracle.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fluxfire
from fluxfire.passes import Float8, FoldedLora, FusedBlocks, ModulationTable
from fluxfire.testing import edit, tiny_kontext
from other_device import DEVICE, OtherDevice
from passes.test_folded_lora import INSIDE, OUTSIDE, apart, load
from thinned import thinned

LISTS = {
    "folded": [FoldedLora(), FusedBlocks()],
    "float8": [Float8(), FusedBlocks()],
    "table": [ModulationTable(host=True)],
    "folded, table": [FoldedLora(), FusedBlocks(), ModulationTable(host=True)],
}
NEAR = {"float8": 0.05}
EVERYWHERE = INSIDE + OUTSIDE

DO = {
    "edit": lambda pipe: edit(pipe, steps=1),
    "load": lambda pipe: load(pipe, layers=EVERYWHERE),
    "load another": lambda pipe: (
        load(pipe, "other", EVERYWHERE, rank=2, seed=4),
        pipe.set_adapters(["style", "other"], [0.7, 1.3]),
    ),
    "scale": lambda pipe: pipe.set_adapters(["style"], [0.5]),
    "fuse": lambda pipe: pipe.fuse_lora(components=["transformer"], lora_scale=0.8),
    "fuse safely": lambda pipe: pipe.fuse_lora(components=["transformer"], safe_fusing=True),
    "unfuse": lambda pipe: pipe.unfuse_lora(components=["transformer"]),
    "delete": lambda pipe: pipe.delete_adapters("style"),
    "unload": lambda pipe: pipe.unload_lora_weights(),
    "move": lambda pipe: pipe.to(DEVICE),
    "away and back": lambda pipe: (pipe.to("cpu"), pipe.to(DEVICE)),
    "set device": lambda pipe: pipe.set_lora_device(["style"], DEVICE),
    "disable": lambda pipe: pipe.transformer.disable_lora(),
    "enable": lambda pipe: pipe.transformer.enable_lora(),
}


@pytest.fixture(autouse=True)
def other_device():
    with OtherDevice() as mode:
        yield mode


def on_device():
    return tiny_kontext().to(DEVICE)


def test_the_emulated_device_is_one(other_device):
    """It has the CPU's bits, and refuses what torch refuses on a real device."""
    with torch.no_grad():
        here, there = torch.ones(3), torch.ones(3).to(DEVICE)
        assert (here.device.type, (there + 1).device) == ("cpu", DEVICE)
        assert there.cpu().device.type == "cpu"
        for wrong in (lambda: here + there, lambda: here.add_(there)):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
    there = edit(on_device(), steps=1)
    assert np.array_equal(there, edit(tiny_kontext(), steps=1))


HISTORIES = [
    "load, optimize, fuse",
    "load, optimize, fuse safely, unfuse",
    "load, optimize, edit, fuse, scale, unfuse",
    "load, optimize, edit, move, fuse",
    "load, optimize, edit, away and back, fuse, edit, unfuse",
    "load, fuse, optimize, unfuse",
    "load, fuse, optimize, edit, move, unfuse",
    "load, fuse, optimize, edit, delete",
    "load, optimize, edit, fuse, unload",
    "load, optimize, fuse, restore",
    "load, optimize, edit, move, fuse, restore, unfuse",
    "optimize, load, fuse, edit, delete",
    "optimize, edit, load, fuse, unfuse",
    "optimize, edit, load, restore",
    "optimize, edit, load, edit, load another, fuse, edit, move, unfuse",
    "optimize, load, edit, disable, move, enable, fuse",
    "optimize, edit, load, edit, unload, load, move, fuse",
    "load, optimize, edit, set device, fuse, set device, unfuse",
]


@pytest.mark.parametrize(("passes", "history"), thinned(LISTS, HISTORIES, 3), ids=str)
def test_whatever_is_done_and_when(passes, history):
    twin, pipe = on_device(), on_device()
    for name in history.split(", "):
        if name in ("optimize", "restore"):
            fluxfire.optimize(pipe, LISTS[passes]) if name == "optimize" else fluxfire.restore(pipe)
            continue
        for one in (twin, pipe):
            DO[name](one)
    bound = NEAR.get(passes, 2e-5)
    assert apart(edit(pipe, steps=1), edit(twin, steps=1)) < bound
    fluxfire.restore(pipe)
    assert not {"_apply", "set_lora_device"} & {*vars(pipe), *vars(pipe.transformer)}
    assert {p.device for p in pipe.transformer.parameters()} == {DEVICE}
    assert apart(edit(pipe, steps=1), edit(twin, steps=1)) < 2e-5
