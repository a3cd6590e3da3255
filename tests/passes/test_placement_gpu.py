"""Placement, Int8 and int8 checkpoints on a real GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import fluxfire
from fluxfire import modules
from fluxfire.kernels.int8 import int8_linear, int8_weight_linear, quantize_int8
from fluxfire.passes import (
    EncodingCache,
    FusedBlocks,
    Int8,
    Int8TextEncoder,
    ModulationTable,
    Placement,
)
from fluxfire.passes.contrib.placement import ROOM
from fluxfire.testing import edit, tiny_kontext

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
LISTS = {
    "placement": [],
    "modulations": [ModulationTable(host=True)],
    "int8": [Int8(), Int8TextEncoder(), ModulationTable(host=True)],
    "weights": [Int8(activations="plain"), FusedBlocks()],
    "cached": [EncodingCache()],
}


def on_gpu(passes, memory=None):
    """Edit with a pipeline that lies in host memory, and one that lies on the GPU as a whole."""
    pipe, twin = tiny_kontext(dtype=BF16), tiny_kontext(dtype=BF16, device="cuda")
    fluxfire.optimize(pipe, fluxfire.order([Placement(memory=memory), *passes]))
    fluxfire.optimize(twin, passes)
    return pipe, twin


@pytest.mark.parametrize("memory", [None, ROOM], ids=["all", "streamed"])
@pytest.mark.parametrize("passes", LISTS.values(), ids=LISTS)
def test_where_the_weights_lie_changes_no_bit(passes, memory):
    pipe, twin = on_gpu(passes, memory)
    for _ in range(2):
        assert np.array_equal(edit(pipe), edit(twin))
    facts = fluxfire.report(pipe).passes[0].facts
    assert (facts["streamed_layers"] > 0) == (memory is not None)
    fluxfire.restore(pipe)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}
    assert {p.device.type for p in pipe.text_encoder_2.parameters()} == {"cpu"}


def test_what_is_streamed_or_read_once_is_pinned():
    pipe, _ = on_gpu([ModulationTable(host=True)], ROOM)
    edit(pipe)
    norm = pipe.transformer.transformer_blocks[0].norm1.linear
    layer = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q
    assert norm.weight.is_pinned()
    assert layer.weight.is_pinned()
    assert norm.bias.is_cuda


def test_the_limit_of_the_allocator_counts():
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.25)
        usable = modules.usable_bytes(torch.device("cuda", 0))
        assert usable <= 0.25 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_an_int8_product_is_exact_in_its_numbers(tokens):
    torch.manual_seed(0)
    x = torch.randn(1, tokens, 256, dtype=BF16, device="cuda")
    weight, bias = torch.randn(128, 256, device="cuda"), torch.randn(128, device="cuda").to(BF16)
    data, scale = quantize_int8(weight)
    rows, row_scale = quantize_int8(x)
    exact = functional.linear(rows.double() * row_scale, data.double() * scale, bias.double())
    made = int8_linear(x, data, scale, bias, BF16)
    assert (made.double() - exact).norm() < 0.004 * exact.norm()
    alone = int8_weight_linear(x, data, scale, bias)
    exact = functional.linear(x.double(), data.double() * scale, bias.double())
    assert (alone.double() - exact).norm() < 0.006 * exact.norm()


def test_an_int8_checkpoint_runs(tmp_path):
    tiny_kontext(dtype=BF16).save_pretrained(tmp_path / "plain")
    fluxfire.quantize(str(tmp_path / "plain"), tmp_path / "int8")
    pipe = fluxfire.load(str(tmp_path / "int8"), memory="auto")
    assert np.isfinite(edit(pipe)).all()
    fluxfire.restore(pipe)
