"""Spark's pipeline: diffusers' own, with defaults of its size."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from torch import nn

import fluxfire
from fluxfire import spark
from fluxfire.errors import LoadError
from fluxfire.passes import QKVFusion
from fluxfire.spark import model, weights
from fluxfire.spark.pipeline import SparkPipeline, load

STEP = 8
"""Pixels of a token's side: the VAE divides by four, and patches by two."""


@pytest.fixture(scope="module")
def untrained():
    pipe = SparkPipeline(**model.parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


TINY = {"width": 32, "height": 32, "_auto_resize": False, "num_inference_steps": 1}
"""Keeps a small picture small."""


def small(colour="teal", mode="RGB"):
    return Image.new(mode, (32, 32), colour)


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


@pytest.mark.parametrize("size", [(160, 96), (700, 500)])
def test_the_result_has_the_references_shape(untrained, size):
    tokens = []
    hook = untrained.transformer.register_forward_pre_hook(
        lambda _, __, inputs: tokens.append(inputs["hidden_states"].shape[1]), with_kwargs=True
    )
    batch = untrained(
        image=[Image.new("RGB", size)] * 2, prompt=["make it rain"] * 2, num_inference_steps=1
    )
    hook.remove()
    fitting = SparkPipeline.reference_size(*size)
    assert [i.size for i in batch.images] == [fitting] * 2
    assert tokens == [2 * (fitting[0] // STEP) * (fitting[1] // STEP)]


def test_arguments_of_the_call_win(untrained):
    seen = []
    hook = untrained.transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["encoder_hidden_states"].shape[1]),
        with_kwargs=True,
    )
    quick = {"num_inference_steps": 1}
    picture = Image.new("RGB", (128, 128), "teal")
    assert edit(untrained, picture, width=160, height=96, **quick).shape == (96, 160, 3)
    assert edit(untrained, picture, height=96, **quick).shape == (96, 128, 3)
    assert edit(untrained, None, **quick).shape == (128, 128, 3)
    short = edit(untrained, small(), max_sequence_length=16, **TINY)
    assert short.shape == (32, 32, 3)
    hook.remove()
    assert seen == [32, 32, 32, 16]


def test_at_its_own_defaults_it_is_diffusers_pipeline(untrained):
    plain = FluxKontextPipeline(**untrained.components)
    plain.set_progress_bar_config(disable=True)
    quick = {"num_inference_steps": 1}
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    )
    expected = edit(
        plain, picture, width=128, height=128, max_area=128 * 128, max_sequence_length=32,
        guidance_scale=5.0, _auto_resize=False, **quick,
    )  # fmt: skip
    assert np.array_equal(edit(untrained, picture, **quick), expected)


def test_the_words_and_the_picture_count(untrained):
    first = edit(untrained, small(), **TINY)
    for other in (
        edit(untrained, small(), prompt="remove the dog", **TINY),
        edit(untrained, small("red"), **TINY),
        edit(untrained, small(), guidance_scale=1.0, **TINY),
    ):
        assert not np.array_equal(other, first)


def test_passes_apply_and_undo(untrained):
    plain = edit(untrained, small(), **TINY)
    fluxfire.optimize(untrained, [QKVFusion()])
    assert isinstance(untrained, SparkPipeline)
    assert np.abs(edit(untrained, small(), **TINY) - plain).max() < 1e-3
    fluxfire.restore(untrained)
    assert type(untrained) is SparkPipeline
    assert np.array_equal(edit(untrained, small(), **TINY), plain)


def test_its_shape_is_kontexts(untrained):
    transformer = untrained.transformer
    assert transformer.config.num_layers >= 3
    assert transformer.config.num_single_layers >= 8
    assert transformer.config.guidance_embeds
    assert transformer.config.in_channels == 4 * untrained.vae.config.latent_channels
    assert sum(transformer.config.axes_dims_rope) == transformer.config.attention_head_dim
    assert untrained.vae_scale_factor == STEP // 2
    scheduler = untrained.scheduler.config
    assert scheduler.base_shift == scheduler.max_shift == pytest.approx(1.15)
    weights_of = {
        name: sum(p.numel() for p in m.parameters())
        for name, m in untrained.components.items()
        if isinstance(m, nn.Module)
    }
    assert weights_of["transformer"] > 0.8 * sum(weights_of.values())
    assert 2 * sum(weights_of.values()) <= 40 * 2**20


def test_fresh_weights_are_seeded_and_leave_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = model.parts(seed=1), model.parts(seed=1), model.parts(seed=2)
    assert torch.equal(torch.rand(3), expected)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert not one[name].training
        first, again, differs = (dict(p[name].named_parameters()) for p in (one, same, other))
        assert all(torch.equal(t, again[key]) for key, t in first.items())
        assert any(not torch.equal(t, differs[key]) for key, t in first.items())


def test_the_call_keeps_its_first_arguments():
    plain = list(inspect.signature(FluxKontextPipeline.__call__).parameters)
    assert list(inspect.signature(SparkPipeline.__call__).parameters)[:3] == plain[:3]


def test_pictures_of_other_modes_are_brought_to_rgb(untrained):
    plain = small((200, 200, 200))
    expected = edit(untrained, plain, **TINY)
    assert np.array_equal(edit(untrained, plain.convert("L"), **TINY), expected)
    assert np.array_equal(edit(untrained, plain.convert("RGBA"), **TINY), expected)
    white = edit(untrained, small("white"), **TINY)
    assert np.array_equal(edit(untrained, small((9, 9, 9, 0), "RGBA"), **TINY), white)
    assert not np.array_equal(white, expected)


def test_arrays_and_tensors_are_taken_in_batches(untrained):
    expected = edit(untrained, small(), **TINY)
    array = np.asarray(small(), np.float32)[None] / 255
    assert np.array_equal(edit(untrained, array, **TINY), expected)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    assert np.array_equal(edit(untrained, tensor, **TINY), expected)


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


@pytest.mark.usefixtures("untrained_weights")
def test_load_gives_a_plain_pipeline_in_the_dtype_asked_for():
    for dtype in (torch.bfloat16, None):
        pipe = load(device="cpu", dtype=dtype)
        assert type(pipe) is SparkPipeline
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            module = getattr(pipe, name)
            assert module.dtype == (dtype or torch.float32)
            assert not module.training


def test_missing_weights_are_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "nowhere.safetensors")
    with pytest.raises(LoadError, match="no trained weights at .*nowhere.*training --out"):
        load()


def test_weights_survive_the_file_and_misfits_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "new" / "spark.safetensors"
    parts = model.parts()
    parts["vae"].register_to_config(scaling_factor=0.7, shift_factor=0.1)
    weights.save(parts, path, trained="by a test")
    with safe_open(path, "pt") as file:
        assert all(str(file.get_tensor(k).dtype) == "torch.float16" for k in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["vae"]) == {"scaling_factor": 0.7, "shift_factor": 0.1}
    other = model.parts(seed=1)
    facts = weights.restore(other, path)
    assert facts["trained"] == "by a test"
    assert other["vae"].config.scaling_factor == 0.7
    assert other["vae"].config.shift_factor == 0.1
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for key, tensor in parts[name].state_dict().items():
            assert torch.equal(other[name].state_dict()[key], tensor.half().to(tensor.dtype)), key
    assert [p.name for p in path.parent.iterdir()] == ["spark.safetensors"]
    other["transformer"].proj_out = nn.Linear(3, 3)
    with pytest.raises(LoadError, match="does not fit Spark's transformer"):
        weights.restore(other, path)
    monkeypatch.setattr(weights, "_vocabulary_hash", lambda: "0")
    with pytest.raises(LoadError, match="another vocabulary"):
        weights.restore(parts, path)


def test_other_values_are_saved_in_place_of_a_models_own(tmp_path):
    parts = {"vae": model.parts()["vae"]}
    first = next(iter(parts["vae"].parameters()))
    weights.save(parts, tmp_path / "a.safetensors", values={first: torch.full_like(first, 2.5)})
    weights.restore(parts, tmp_path / "a.safetensors")
    assert (first == 2.5).all()


def test_the_package_gives_its_names_when_first_used():
    assert set(spark.__all__) <= set(dir(spark))
    for name in spark.__all__:
        assert getattr(spark, name).__name__ == name
    assert spark.SparkPipeline is SparkPipeline
    with pytest.raises(AttributeError, match="no attribute 'SparkPipelin'"):
        _ = spark.SparkPipelin


def test_the_trained_weights_load_and_are_small():
    load(device="cpu")
    assert weights.SHIPPED.stat().st_size <= 40 * 2**20
