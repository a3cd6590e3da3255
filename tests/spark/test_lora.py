"""A LoRA on Spark, `tests/spark/blue.safetensors`: every pass must keep what it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxfire
from fluxfire import spark
from fluxfire.planning import registry
from spark_training.lora import INSTRUCTIONS
from thinned import thinned

LORA = Path(__file__).parent / "blue.safetensors"  # benchmarks/spark_training/lora.py made it
HEAVY = {"compile": pytest.mark.slow}
CASES = [
    pytest.param(name, when, marks=HEAVY.get(name, ()))
    for name, when in thinned(registry.built_in(), ["before", "after"], 2)
]
STEPS = 4


def load():
    return spark.load(device="cpu", dtype=torch.float32)


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where MegaCache() keeps its file
    return load()


@pytest.fixture(scope="module")
def scene():
    return spark.examples(n=1, kinds=("recolour",))[0].source


@pytest.fixture(scope="module")
def expected(scene):
    """What the plain pipeline makes of the scene with the LoRA."""
    pipe = load()
    pipe.load_lora_weights(LORA.parent, weight_name=LORA.name)
    return edit(pipe, scene)


def edit(pipe, scene):
    picture = pipe(
        image=scene, prompt=INSTRUCTIONS[0], num_inference_steps=STEPS, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    return picture


def blueness(picture):
    """How much more blue than red a picture is, in [-1, 1]."""
    return float((picture[..., 2] - picture[..., 0]).mean())


def test_it_is_small_and_does_something(pipe, scene, expected):
    assert LORA.stat().st_size <= 2**20
    assert blueness(expected) > 0.2 + blueness(edit(pipe, scene))


@pytest.mark.parametrize(("name", "when"), CASES)
def test_every_pass_keeps_it(pipe, scene, expected, name, when):
    pass_ = registry.make(name)
    if when == "before":
        pipe.load_lora_weights(LORA.parent, weight_name=LORA.name)
    planned = fluxfire.plan(pipe, [pass_])
    if not planned.ok:
        pytest.skip("; ".join(planned.complaints()))
    fluxfire.optimize(pipe, [pass_])
    if when == "after":
        pipe.load_lora_weights(LORA.parent, weight_name=LORA.name)
    made = edit(pipe, scene)
    # Lossy passes leave work out; what the LoRA does must show all the same.
    near = 0.02 if fluxfire.report(pipe).passes[0].exactness == "lossy" else 1e-3
    assert np.abs(made - expected).mean() < near
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe, scene), expected)
