from __future__ import annotations

import numpy as np
import torch

import fluxfire
from fluxfire.passes import MemoryLayout
from fluxfire.testing import edit

LAST = torch.channels_last


def convolutions(pipe):
    return [p for p in pipe.vae.parameters() if p.ndim == 4]


def test_only_the_vae_has_what_it_changes(pipe):
    pointwise = [p for p in convolutions(pipe) if p.is_contiguous(memory_format=LAST)]
    fluxfire.optimize(pipe, [MemoryLayout()])
    change = fluxfire.report(pipe).passes[0].change
    assert change.count == len(convolutions(pipe)) - len(pointwise) > 0
    assert change.bytes == 0
    assert all(p.is_contiguous(memory_format=LAST) for p in convolutions(pipe))
    assert not [p for p in pipe.transformer.parameters() if p.ndim == 4]


def test_strides_come_back_also_after_a_cast(pipe, reference):
    strides = [p.stride() for p in convolutions(pipe)]
    fluxfire.optimize(pipe, [MemoryLayout()])
    assert [p.stride() for p in convolutions(pipe)] != strides
    pipe.to(torch.float64).to(torch.float32)
    fluxfire.restore(pipe)
    assert [p.stride() for p in convolutions(pipe)] == strides
    assert np.array_equal(edit(pipe), reference)
