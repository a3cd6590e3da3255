"""Every kind of PEFT's adapters, on every kind of layer, under passes that could be wrong about it.

The plain pipeline with the same adapter is the oracle, also for a call with a negative scale. A
pass may refuse a kind, by its name.
"""

from __future__ import annotations

import functools
from itertools import product

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

import fluxfire
from fluxfire.errors import FluxfireError
from fluxfire.passes import (
    EncodingCache,
    FirstBlockCache,
    Float8,
    FoldedLora,
    FusedBlocks,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.testing import edit, tiny_kontext
from thinned import thinned

PLACES = {
    "blocks": ("transformer", r".*(to_q|to_v|to_out\.0|net\.2|proj_mlp|to_add_out)"),
    "modulations": ("transformer", r".*(norm1|norm1_context|norm)\.linear"),
    "x_embedder": ("transformer", r"x_embedder"),
    "context_embedder": ("transformer", r"context_embedder"),
    "time_text_embed": ("transformer", r"time_text_embed.*linear_\d"),
    "norm_out": ("transformer", r"norm_out\.linear"),
    "proj_out": ("transformer", r"proj_out"),
    "CLIP": ("text_encoder", r".*(q_proj|v_proj|fc1)"),
    "T5": ("text_encoder_2", r".*\.(q|v|wi_0)"),
}
KINDS = {
    "LoRA": (LoraConfig, {}),
    "rsLoRA": (LoraConfig, {"use_rslora": True}),
    "DoRA": (LoraConfig, {"use_dora": True}),
    "with biases": (LoraConfig, {"lora_bias": True}),
    "LoKr": (LoKrConfig, {}),
    "LoHa": (LoHaConfig, {}),
}
LISTS = {
    "folded": [FoldedLora(), FusedBlocks()],
    "float8": [Float8(), FusedBlocks()],
    "fused": [FusedBlocks(), EncodingCache()],
    "table": [FoldedLora(), FusedBlocks(), ModulationTable()],
    "table on the host": [ModulationTable(host=True), FirstBlockCache(0)],
    "caches": [FoldedLora(), ReferenceCache(0), EncodingCache()],
    "fused projections": [QKVFusion(), EncodingCache()],
}
NEGATIVE = {"joint_attention_kwargs": {"scale": -0.5}}
CASES = [(place, kind) for place in PLACES for kind in KINDS]
# Float8 sums a LoRA into its own weights, and can sum nothing else.
REFUSED = {("blocks", kind) for kind in ("DoRA", "with biases", "LoKr", "LoHa")}


def load(pipe, place, kind, name="style", seed=3):
    component, layers = PLACES[place]
    config, settings = KINDS[kind]
    model = pipe.components[component]
    inject_adapter_in_model(config(r=3, target_modules=layers, **settings), model, name)
    generator = torch.Generator().manual_seed(seed)
    for where, weight in model.named_parameters():
        if f".{name}" in where:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.4
    return pipe


def pictures(pipe):
    """One call, one with a scale, and one without again, since diffusers divides by it."""
    return [edit(pipe, steps=2, **call) for call in ({}, NEGATIVE, {})]


def apart(some, others):
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


@functools.cache
def expected(case):
    return pictures(load(tiny_kontext(), *case))


@functools.cache
def without():
    return pictures(tiny_kontext())


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_each_kind_shows_in_the_plain_picture(case):
    """Else a pass that ignores it would look right."""
    first, negative, again = expected(case)
    assert np.abs(first - without()[0]).max() > 1e-3
    assert np.abs(negative - first).max() > 1e-3
    assert np.array_equal(first, again)


TRIES = list(product(LISTS, ("before", "after")))


@pytest.mark.parametrize(("case", "how"), thinned(CASES, TRIES, len(TRIES)), ids="-".join)
def test_each_kind_is_right_or_refused(case, how):
    passes, when = how
    pipe = tiny_kontext()
    if when == "before":
        load(pipe, *case)
    fluxfire.optimize(pipe, LISTS[passes])
    if when == "after":
        edit(pipe, steps=1)
        load(pipe, *case)
    if passes == "float8" and when == "after" and case in REFUSED:
        with pytest.raises(FluxfireError, match="to_q has an adapter that float8 weights cannot"):
            edit(pipe, steps=1)
        return
    bound = apart(expected(case), without()) / 3 if passes == "float8" else 1e-4
    assert apart(pictures(pipe), expected(case)) < bound


@pytest.mark.parametrize("passes", LISTS)
def test_one_of_each_kind_at_once(passes):
    """In one model, each kind on layers of its own, and two on the same."""

    def loaded(pipe):
        load(pipe, "blocks", "LoRA", "one")
        load(pipe, "modulations", "DoRA", "one")
        load(pipe, "proj_out", "LoKr", "one")
        load(pipe, "blocks", "rsLoRA", "two", seed=4)
        load(pipe, "CLIP", "LoRA", "two", seed=4)
        pipe.set_adapters(["one", "two"], [0.8, -0.4])
        return pipe

    pipe = loaded(fluxfire.optimize(tiny_kontext(), LISTS[passes]))
    plain = pictures(loaded(tiny_kontext()))
    bound = apart(plain, without()) / 3 if passes == "float8" else 1e-4
    assert apart(pictures(pipe), plain) < bound
