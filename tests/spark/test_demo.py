"""`fluxfire demo`, and Spark on the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfire import spark
from fluxfire.bench import demo, held_out
from fluxfire.cli import main
from fluxfire.errors import LoadError
from fluxfire.passes import QKVFusion
from fluxfire.spark import weights

pytestmark = pytest.mark.usefixtures("untrained_weights")
QUICK = ["--steps", "2", "--passes", "qkv-fusion"]


def test_load_gives_a_plain_pipeline_in_the_dtype_asked_for():
    pipe = spark.load(device="cpu", dtype=torch.bfloat16)
    assert type(pipe) is spark.SparkPipeline
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, name)
        assert module.dtype == torch.bfloat16
        assert not module.training
    assert spark.load(device="cpu").transformer.dtype == torch.float32


def test_missing_weights_are_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "nowhere.safetensors")
    with pytest.raises(LoadError, match="no trained weights at .*nowhere.*training --out"):
        spark.load()


def test_demo_compares_on_held_out_scenes(capsys, tmp_path):
    output = tmp_path / "grid.png"
    assert main(["demo", "-n", "3", "-o", str(output), *QUICK]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == ""
    assert [line.split()[0] for line in lines[2:4]] == ["plain", "qkv-fusion"]
    assert "of 3" in lines[2]
    assert "%" not in out  # no cache, no steps left out
    assert str(output) in err
    assert "8/8" in err  # the progress bar: the two of them, each applied and then three edits
    with Image.open(output) as grid:
        assert grid.width == 5 * 132 + 4
        assert grid.height == 3 * 148 + 20


def test_demo_shows_a_cache_unless_told_otherwise(capsys, tmp_path):
    arguments = ["demo", "-n", "1", "--steps", "3", "-o", str(tmp_path / "grid.png")]
    assert main(arguments) == 0
    plain, cached = capsys.readouterr().out.splitlines()[2:4]
    assert "%" not in plain
    assert cached.startswith("first-block-cache")
    assert "0%" in cached
    assert main([*arguments, "--preset", "fast"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "settings: FirstBlockCache(threshold=0.5, predict='quadratic')"
    assert main([*arguments, "--preset", "nope"]) == 1
    assert "nope" in capsys.readouterr().err


def test_demo_takes_a_picture_of_ones_own(capsys, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (300, 200), "teal").save(photo)
    output = tmp_path / "grid.png"
    own = ["demo", "--image", str(photo), "--prompt", "make the dog blue", "-o", str(output)]
    assert main([*own, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "Spark never learned 'dog'" in err
    assert "of 1" not in out  # there is no target to check against
    with Image.open(output) as grid:
        assert grid.width == 4 * (160 + 4) + 4
    assert main([*own[:3], "-o", str(output)]) == 1
    assert "--image and --prompt go together" in capsys.readouterr().err


def test_run_edits_with_spark(capsys, tmp_path):
    photo, output = tmp_path / "photo.png", tmp_path / "out.png"
    Image.new("RGB", (128, 128), "teal").save(photo)
    arguments = ["run", "--model", "spark", "--image", str(photo), "--prompt", "make it night"]
    assert main([*arguments, "-o", str(output), *QUICK]) == 0
    with Image.open(output) as picture:
        assert picture.size == (128, 128)
    told = capsys.readouterr().err
    assert "never learned" not in told
    assert "knows only drawn scenes of shapes" in told
    assert main([*arguments[:-1], "add a dragon", "-o", str(output), *QUICK]) == 0
    assert "Spark never learned 'dragon'" in capsys.readouterr().err


def test_the_difference_is_amplified_and_the_pipeline_left_plain():
    pipe = spark.load(device="cpu")
    tasks = held_out(2)
    done = demo.run(pipe, [QKVFusion()], tasks, steps=2, seed=0)
    assert type(pipe) is spark.SparkPipeline
    plain = np.asarray(done.plain.pictures[0]).astype(int)
    optimized = np.asarray(done.optimized.pictures[0]).astype(int)
    shown = np.asarray(done.grid())[20 : 20 + 128, 3 * 132 + 4 : 3 * 132 + 132]
    assert np.array_equal(shown, np.minimum(255, 8 * np.abs(plain - optimized)))
    assert [len(t.edits) for t in (done.plain, done.optimized)] == [2, 2]
