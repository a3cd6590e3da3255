"""`fluxfire demo`, and Spark on the command line."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from fluxfire import spark
from fluxfire.bench import demo, held_out
from fluxfire.cli import main
from fluxfire.passes import FirstBlockCache, QKVFusion

pytestmark = pytest.mark.usefixtures("untrained_weights")
QUICK = ["--steps", "2", "--passes", "qkv-fusion"]


def test_demo_compares_on_held_out_scenes(capsys, tmp_path):
    output = tmp_path / "grid.png"
    assert main(["demo", "-n", "3", "-o", str(output), *QUICK]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == ""
    assert [line.split()[0] for line in lines[2:4]] == ["plain", "qkv-fusion"]
    assert "of 3" in lines[2]
    assert "2 of 2" in lines[3]
    assert "num_inference_steps" not in out  # nothing lossy: no row and verdict of fewer steps
    assert str(output) in err
    assert "plain, edit, 2 steps: 3 of 3" in err
    assert "eager" not in err
    with Image.open(output) as grid:
        assert grid.width == 5 * 132 + 4
        assert grid.height == 3 * 148 + 20


def test_demo_shows_a_cache_unless_told_otherwise(capsys, tmp_path):
    arguments = ["demo", "-n", "1", "--steps", "3", "-o", str(tmp_path / "grid.png")]
    assert main(arguments) == 0
    plain, cached = capsys.readouterr().out.splitlines()[2:4]
    assert "3 of 3" in plain
    assert cached.startswith("first-block-cache")
    assert main([*arguments, "--preset", "fast", "--overwrite"]) == 0
    told = capsys.readouterr().out
    own = "threshold=0.15, warmup_steps=6"
    assert f"settings: FirstBlockCache({own}, schedule=(Schedule(20, " in told
    assert main([*arguments, "--preset", "nope"]) == 2
    assert "nope" in capsys.readouterr().err


def test_demo_takes_a_picture_of_ones_own(capsys, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (300, 200), "teal").save(photo)
    output = tmp_path / "grid.png"
    own = ["demo", "--image", str(photo), "--prompt", "make the wizard blue", "-o", str(output)]
    assert main([*own, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "Spark never learned 'wizard'" in err
    assert "of 1" not in out  # there is no target to check against
    with Image.open(output) as grid:
        assert grid.width == 4 * (160 + 4) + 4
    assert main([*own[:3], "-o", str(output)]) == 2
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
    assert "It edits pictures of emoji" in told
    again = [*arguments[:-1], "add a wizard", "-o", str(output), "--overwrite"]
    assert main([*again, *QUICK]) == 0
    assert "Spark never learned 'wizard'" in capsys.readouterr().err


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


def skipping(steps):
    return FirstBlockCache(schedule=steps)


def test_the_demo_of_a_lossy_list_has_a_row_for_plain_with_as_many_steps():
    """Two of four steps hit, each a block of Spark's twelve: 2.2 steps of work, 3 plain steps."""
    pipe = spark.load(device="cpu")
    done = demo.run(pipe, [skipping([2, 3])], held_out(5), steps=4, seed=0)
    lines = str(done).splitlines()
    names = ["plain", "plain, 3 steps", "first-block-cache"]
    assert [name for name, _ in done.rows] == names
    assert [re.split(r"  +", line)[0] for line in lines[2:5]] == names
    assert [re.search(r"\d+ of \d+", line)[0] for line in lines[2:5]] == [
        "4 of 4",
        "3 of 3",
        "2 of 4",
    ]
    assert "2.2 steps: it computed 2 of 4, and a skipped step still runs its first" in lines[6]
    assert lines[6].endswith("Rounded up, plain gets 3 steps.")
    assert any("num_inference_steps=3" in line and "dB [" in line for line in lines[5:])
    assert done.grid().width == 6 * 132 + 4
    wanted = pipe(
        image=held_out(1)[0].picture, prompt=held_out(1)[0].instruction, num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(done.fewer.pictures[0]), np.asarray(wanted))


def test_one_example_tells_nothing():
    done = demo.run(spark.load(device="cpu"), [skipping([2, 3])], held_out(1), steps=4, seed=0)
    assert "One example does not tell whether this beats num_inference_steps=3." in str(done)
