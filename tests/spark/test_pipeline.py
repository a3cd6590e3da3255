"""Spark's pipeline: diffusers' own, with defaults of its size."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

import fluxfire
from fluxfire.passes import QKVFusion
from fluxfire.spark import model
from fluxfire.spark.pipeline import SparkPipeline


@pytest.fixture(scope="module")
def untrained():
    pipe = SparkPipeline(**model.parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, picture, **call):
    call = {"prompt": "make it night", "num_inference_steps": 2, "output_type": "np"} | call
    return pipe(image=picture, generator=torch.Generator().manual_seed(0), **call).images[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((128, 128), (128, 128)),
        ((160, 96), (160, 96)),
        ((112, 144), (112, 144)),
        ((1024, 1024), (128, 128)),
        ((100, 100), (128, 128)),
        ((64, 64), (128, 128)),
        ((1600, 900), (176, 96)),
        ((5, 5000), (16, 4048)),
    ],
)
def test_sizes_that_fit(given, expected):
    assert SparkPipeline.reference_size(*given) == expected


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (700, 500)])
def test_the_result_has_the_references_shape(untrained, size):
    out = edit(untrained, Image.new("RGB", size, "teal"))
    assert out.shape[1::-1] == SparkPipeline.reference_size(*size)
    tokens = []
    hook = untrained.transformer.register_forward_pre_hook(
        lambda _, __, inputs: tokens.append(inputs["hidden_states"].shape[1]), with_kwargs=True
    )
    batch = untrained(
        image=[Image.new("RGB", size)] * 2, prompt=["blur it"] * 2, num_inference_steps=1
    )
    edit(untrained, Image.new("RGB", size), num_inference_steps=1)
    hook.remove()
    fitting = SparkPipeline.reference_size(*size)
    assert [i.size for i in batch.images] == [fitting] * 2
    assert tokens == [2 * (fitting[0] // 16) * (fitting[1] // 16)] * 2


def test_arguments_of_the_call_win(untrained):
    picture = Image.new("RGB", (128, 128), "teal")
    assert edit(untrained, picture, width=160, height=96).shape == (96, 160, 3)
    assert edit(untrained, picture, width=160).shape == (128, 160, 3)
    assert edit(untrained, picture, height=96).shape == (96, 128, 3)
    assert edit(untrained, None).shape == (128, 128, 3)
    small = edit(untrained, picture, width=64, height=64, max_sequence_length=16)
    assert small.shape == (64, 64, 3)


def test_at_its_own_defaults_it_is_diffusers_pipeline(untrained):
    plain = FluxKontextPipeline(**untrained.components)
    plain.set_progress_bar_config(disable=True)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    )
    expected = edit(
        plain,
        picture,
        width=128,
        height=128,
        max_area=128 * 128,
        max_sequence_length=32,
        _auto_resize=False,
    )
    assert np.array_equal(edit(untrained, picture), expected)


def test_passes_apply_and_undo(untrained):
    picture = Image.new("RGB", (128, 128), "teal")
    plain = edit(untrained, picture)
    fluxfire.optimize(untrained, [QKVFusion()])
    assert isinstance(untrained, SparkPipeline)
    assert np.abs(edit(untrained, picture) - plain).max() < 1e-3
    fluxfire.restore(untrained)
    assert type(untrained) is SparkPipeline
    assert np.array_equal(edit(untrained, picture), plain)


def test_its_size_keeps_within_the_promise():
    parts = model.parts()
    transformer = parts["transformer"]
    assert 5e6 <= sum(p.numel() for p in transformer.parameters()) <= 6.5e6
    assert transformer.config.num_layers >= 3
    assert transformer.config.num_single_layers >= 8
    assert transformer.config.guidance_embeds
    weights = sum(
        p.numel() for m in parts.values() if isinstance(m, torch.nn.Module) for p in m.parameters()
    )
    assert 2 * weights <= 16 * 2**20


def test_the_call_keeps_its_first_arguments():
    plain = list(inspect.signature(FluxKontextPipeline.__call__).parameters)
    assert list(inspect.signature(SparkPipeline.__call__).parameters)[:3] == plain[:3]


def test_pictures_of_other_modes_are_brought_to_rgb(untrained):
    plain = Image.new("RGB", (128, 128), (200, 200, 200))
    expected = edit(untrained, plain)
    assert np.array_equal(edit(untrained, plain.convert("L")), expected)
    assert np.array_equal(edit(untrained, plain.convert("RGBA")), expected)
    clear = Image.new("RGBA", (128, 128), (9, 9, 9, 0))
    white = edit(untrained, Image.new("RGB", (128, 128), "white"))
    assert np.array_equal(edit(untrained, clear), white)


def test_arrays_and_tensors_are_taken_in_batches(untrained):
    picture = Image.new("RGB", (128, 128), "teal")
    expected = edit(untrained, picture)
    array = np.asarray(picture, np.float32)[None] / 255
    assert np.array_equal(edit(untrained, array), expected)
    assert np.array_equal(edit(untrained, torch.from_numpy(array).permute(0, 3, 1, 2)), expected)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (Image.new("RGB", (1, 1)), "a picture of 1x1 is too small for Spark: each side needs 16"),
        (Image.new("RGB", (4000, 3)), "a picture of 4000x3 is too small"),
        (np.zeros((128, 128, 3)), r"cannot edit a ndarray; .* \(batch, height, width, 3\)"),
        ("photo.jpg", "cannot edit a str; give it Pillow pictures"),
    ],
)
def test_pictures_that_cannot_be_edited_are_refused_in_words(untrained, picture, said):
    with pytest.raises(ValueError, match=said):
        edit(untrained, picture)
