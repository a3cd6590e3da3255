"""A list that a refusal calls workable works: it is applied, it runs, and its picture is right."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig

import fluxfire
from fluxfire import presets
from fluxfire.errors import PlanError
from fluxfire.passes import (
    Attention,
    Compile,
    EncodingCache,
    FirstBlockCache,
    Float8,
    FusedBlocks,
    InductorPatch,
    MemoryLayout,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.testing import edit, tiny_kontext
from passes.test_compile import with_ip_adapter
from thinned import ALL, half, names

CLOSE = 1e-4
PASSES = [
    InductorPatch(),
    QKVFusion(),
    MemoryLayout(),
    Float8(),
    Attention(),
    Attention("fa3"),
    Attention("fa3-fp8"),
    FusedBlocks(),
    ModulationTable(),
    ModulationTable(host=True),
    EncodingCache(),
    FirstBlockCache(),
    ReferenceCache(),
    Compile(),
    Compile(vae=True, text_encoders=True),
    Compile("transformer"),
    Compile(fullgraph=False),
]
LISTS = [
    *([p] for p in PASSES),
    *map(list, itertools.permutations([QKVFusion(), Float8(), FusedBlocks()], 2)),
    [InductorPatch(), ModulationTable(), Compile("transformer")],
    [FirstBlockCache(), ReferenceCache(), Compile("transformer")],
    [Compile(), FusedBlocks(), FusedBlocks()],
    *(list(presets.named(name)) for name in presets.NAMES),
]


def casting(pipe):
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def offloaded(pipe):
    cpu_offload(pipe.transformer, torch.device("cpu"))


def model_offloaded(pipe):
    cpu_offload_with_hook(pipe.transformer, "cpu")


def adapted(pipe):
    targets = ["to_q", "to_k", "proj_mlp"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def cached(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))


def fused(pipe):
    pipe.transformer.fuse_qkv_projections()


def compiled(pipe):
    pipe.transformer.compile(backend="eager")


def blocks_compiled(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def without_encoders(pipe):
    pipe.text_encoder = pipe.text_encoder_2 = None


def processors_of_others(pipe):
    class Mine(type(pipe.transformer.single_transformer_blocks[0].attn.processor)):
        """A processor that no pass knows."""

    pipe.transformer.set_attn_processor(Mine())


STATES = [
    casting, offloaded, model_offloaded, adapted, with_ip_adapter, cached, fused, compiled,
    blocks_compiled, without_encoders, processors_of_others,
]  # fmt: skip


def refusals(pipe):
    """Every list that is refused, with what is offered in its place; each offer once."""
    offered = {}
    for asked in LISTS:
        try:
            fluxfire.plan(pipe, asked).raise_if_bad()
        except PlanError as error:
            if error.suggestion:
                offered[error.suggestion] = asked
    return offered


def picture(pipe, call):
    with contextlib.ExitStack() as stack:
        if pipe.transformer.is_cache_enabled:  # Kontext's pipeline does not name its calls to it
            stack.enter_context(pipe.transformer.cache_context("cond"))
        return edit(pipe, steps=2, **call)


def try_all(state, compiling):
    pipe = tiny_kontext()
    call = {}
    if state is without_encoders:
        embeds, pooled, _ = pipe.encode_prompt("a cat", max_sequence_length=24)
        call = {
            "prompt": None,
            "prompt_embeds": embeds.detach(),
            "pooled_prompt_embeds": pooled.detach(),
        }
    if state is with_ip_adapter:
        call["ip_adapter_image_embeds"] = [torch.ones(1, 1, 12)]
        call["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 12)]
    if state is not None:
        state(pipe)
    plain, tried = picture(pipe, call), 0
    for suggestion, asked in refusals(pipe).items():
        if any(p.stage == "compile" for p in suggestion) is not compiling:
            continue
        fluxfire.optimize(pipe, suggestion)
        made = picture(pipe, call)
        if all(p.exactness != "lossy" for p in suggestion):
            assert np.abs(made - plain).max() < CLOSE, (asked, suggestion)
        else:
            assert np.isfinite(made).all()
        fluxfire.restore(pipe)
        assert np.array_equal(picture(pipe, call), plain), (asked, suggestion)
        tried += 1
    return tried


@pytest.mark.parametrize("state", half(STATES, 1), ids=names)
def test_what_is_offered_works(state):
    assert try_all(state, compiling=False) or state in (model_offloaded, without_encoders)


def test_what_is_offered_on_a_plain_pipeline_works():
    assert try_all(None, compiling=False) >= 3


# Each compiles for half a minute.
TO_COMPILE = [None, *STATES] if ALL else [adapted]


@pytest.mark.slow
@pytest.mark.parametrize("state", TO_COMPILE, ids=lambda s: s.__name__ if s else "plain")
def test_what_is_offered_with_compilation_works(state):
    torch.compiler.reset()
    try_all(state, compiling=True)
