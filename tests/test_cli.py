"""The command line, as a user types it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxfire import presets
from fluxfire.cli import main
from fluxfire.errors import PictureError
from fluxfire.passes.mega_cache import machine
from fluxfire.passes.shared import artifact_file
from fluxfire.pictures import read_picture


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    path = tmp_path / "in.jpg"
    Image.fromarray(pixels).save(path)
    return str(path)


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_passes(capsys):
    status, out, _ = run(capsys, "passes")
    assert status == 0
    for name in ("inductor-patch", "qkv-fusion", "memory-layout", "attention", "compile"):
        assert name in out


def test_plan(capsys):
    status, out, _ = run(capsys, "plan")
    assert status == 0
    assert "fused-blocks    blocks       close      ready" in out
    status, out, _ = run(capsys, "plan", "--passes", "compile,qkv-fusion")
    assert status == 1
    assert "must come before compile" in out
    assert "qkv-fusion  weights  close      error: see below" in out
    _, _, err = run(capsys, "plan", "--passes", "compile,qkv-fuson")
    assert "On the command line: --passes qkv-fusion,compile" in err
    _, out, err = run(capsys, "plan", "--preset", "qkv-fusion,compile")
    assert "did you mean --passes qkv-fusion,compile?" in err
    _, out, _ = run(capsys, "plan", "--preset", "fast")
    own = "threshold=0.15, warmup_steps=6, max_consecutive_hits=3"
    assert f"settings: FirstBlockCache({own})" in out


def test_doctor(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "torch " in out
    assert "GPU " in out
    assert "memory-layout      applies" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs alone")
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (None, "not set; export passive, or scripts"),
        ("active", "active; export passive, or scripts"),
        ("PASSIVE", "PASSIVE"),
    ],
)
def test_doctor_tells_how_threads_wait_without_the_command(capsys, monkeypatch, own, said):
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    _, out, _ = run(capsys, "doctor", "--model", "random-tiny")
    (line,) = [line for line in out.splitlines() if line.startswith("OMP_WAIT_POLICY")]
    told = line.removeprefix("OMP_WAIT_POLICY").strip()
    assert told == said if said == "PASSIVE" else told.startswith(said)


def test_run_edits_a_picture_and_reports(capsys, photo, tmp_path):
    output = tmp_path / "out.png"
    status, out, err = run(
        capsys, "run", "--model", "random-tiny", "--image", photo, "--prompt", "make it night",
        "--passes", "inductor-patch,qkv-fusion", "-o", output, "--size", "64x48", "--steps", 3,
        "--seed", 7, "--report", "json",
    )  # fmt: skip
    assert status == 0
    with Image.open(output) as picture:
        assert picture.size == (64, 48)
    report = json.loads(out)
    assert report["environment"]["packages"]["diffusers"]
    assert [p["name"] for p in report["passes"]] == ["inductor-patch", "qkv-fusion"]
    assert report["generations"][0]["steps"] == 3
    assert "random-tiny has random weights" in err
    assert "3/3" in err  # the progress bar


def test_the_seed_decides(capsys, photo, tmp_path):
    pictures = []
    for seed in (1, 1, 2):
        output = tmp_path / "out.png"
        run(
            capsys, "run", "--image", photo, "--prompt", "x", "--passes", "qkv-fusion",
            "--size", "32x32", "--steps", 2, "--seed", seed, "-o", output,
        )  # fmt: skip
        pictures.append(np.asarray(Image.open(output)))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--image": "nowhere.jpg"}, "cannot read nowhere.jpg: No such file or directory"),
        ({"--image": __file__}, "is not a picture that can be read"),
        ({"--image": "."}, "cannot read .: Is a directory"),
        ({"-o": "no/such/folder/x.png"}, "there is no folder no/such/folder"),
        ({"-o": "."}, "cannot write .: it is a folder"),
        ({"-o": "x.hdf"}, "cannot write x.hdf: .hdf is no picture format"),
        ({"--passes": ""}, "--passes '' names no pass; write none for none"),
        ({"-o": "x.doc"}, "cannot write x.doc: .doc is no picture format"),
        ({"-o": "x.psd"}, "cannot write x.psd: .psd is no picture format"),
        ({"--size": "160000x160000"}, "size 160000x160000: no side can be longer than 4096"),
        ({"--size": "100x64"}, "size 100x64: both sides must be positive multiples of 16"),
        (
            {"--preset": "quick"},
            "there is no preset 'quick'; there are faithful, balanced, fast, article",
        ),
        ({"--model": "./nowhere"}, "there is no folder ./nowhere, and it is no hub id"),
    ],
)
def test_bad_input_gets_one_line_and_a_status(capsys, photo, tmp_path, changed, words):
    arguments = {"--image": photo, "--prompt": "x", "-o": str(tmp_path / "out.png")} | changed
    status, out, err = run(capsys, "run", *(a for pair in arguments.items() for a in pair))
    assert status == 1
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--image", "a", "--prompt", "b", "--size", "big"],
        ["dance"],
        ["run", "--image", "a", "--prompt", "\udcff"],
        ["run", "--image", "a", "--prompt", "b", "--seed", "99999999999999999999"],
        [],
    ],
)
def test_misuse_is_argparses(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fluxfire" in capsys.readouterr().err


def test_without_a_command_all_are_listed(capsys):
    with pytest.raises(SystemExit):
        main([])
    said = capsys.readouterr().err
    assert "edit pictures with Spark, plain and with passes, and compare" in said
    assert all(name in said for name in ("passes", "plan", "doctor", "run", "tune", "serve"))


def test_megacache(capsys, tmp_path):
    file = tmp_path / "m"
    assert run(capsys, "megacache", "verify", file)[0] == 1
    artifact_file.add(
        file, [artifact_file.Payload({"gpu": "H100"}, ("1+2+3",), 2.5, "now", b"xyz")], None
    )
    status, out, _ = run(capsys, "megacache", "inspect", file)
    assert status == 0
    for words in ("payload 0", "H100", "1+2+3", "2.5 s", "m is intact, and nobody else can"):
        assert words in out
    status, out, _ = run(capsys, "megacache", "verify", file)
    assert (status, out.split("; ")[1]) == (1, "0 of 1 payloads fit this machine\n")
    artifact_file.add(file, [artifact_file.Payload(machine(), (), 1.0, "now", b"here")], None)
    status, out, _ = run(capsys, "megacache", "verify", file)
    assert (status, out.split("; ")[1]) == (0, "1 of 2 payloads fit this machine\n")
    file.chmod(0o666)  # a file that would not be used can be looked at
    status, out, err = run(capsys, "megacache", "inspect", file)
    assert status == 1
    assert "H100" in out
    assert "would not be used: it can be written by other users" in err
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1])
    status, out, err = run(capsys, "megacache", "verify", file)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {file} would not be used: it is damaged")


def test_a_damaged_env_file_is_named(capsys, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xff\n")
    status, _, err = run(capsys, "run", "--model", "a/b", "--image", photo, "--prompt", "x")
    assert status == 1
    assert ".env cannot be read" in err


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "fluxfire", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fluxfire 0.")


def test_nothing_is_warned_of_that_no_user_can_mend():
    """Such as transformers' advice, where it is imported first, to install torchvision."""
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-m", "fluxfire", "plan", "--passes", "qkv-fusion"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""


def test_a_saved_tiny_pipeline_stays_tiny(capsys, photo, tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "model")
    status, _, _ = run(
        capsys, "run", "--image", photo, "--prompt", "x", "--passes", "qkv-fusion",
        "--model", tmp_path / "model", "--steps", 1, "-o", tmp_path / "out.png",
    )  # fmt: skip
    assert status == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 700), st.sampled_from(["PNG", "JPEG", "GIF"]))
def test_damaged_pictures_are_refused_in_words(damage, place, kind):
    whole = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(whole, kind)
    data = bytearray(whole.getvalue())
    data[place : place + len(damage)] = damage
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(PictureError):
            assert read_picture(file.name).mode == "RGB"


def test_pictures_too_small_to_edit_are_refused(tmp_path, capsys):
    Image.new("RGB", (4000, 3)).save(tmp_path / "thin.png")
    arguments = ["run", "--image", str(tmp_path / "thin.png"), "--prompt", "make it night"]
    assert main([*arguments, "-o", str(tmp_path / "o.png")]) == 1
    assert "has 4000x3 pixels; a side needs 16 or more" in capsys.readouterr().err


def test_what_is_transparent_becomes_white(tmp_path):
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 16, 32))
    picture.save(tmp_path / "clear.png")
    read = read_picture(tmp_path / "clear.png")
    assert read.mode == "RGB"
    assert (read.getpixel((3, 3)), read.getpixel((30, 3))) == ((255, 0, 0), (255, 255, 255))


def test_threads_do_not_spin_while_they_wait(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert main(["demo", "--passes", "nonsense"]) == 1
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "-n", "1000000"], "-n 1000000 is more than 5000"),
        (["bisect", "--example", "1000000"], "--example 1000000 is past the last scene, 4999"),
        (["bisect", "--min-psnr", "-5"], "--min-psnr -5 is not between 0 and 100"),
        (["demo", "--passes", "compile,qkv-fusion"], "Nothing was changed"),
        (["plan", "--preset", "faithfull"], "did you mean 'faithful'?"),
        (["plan", "--passes", "QKVFusion"], "did you mean 'qkv-fusion'?"),
        (
            ["plan", "--passes", "faithful,qkv-fusion"],
            "write --preset faithful, or name its passes: inductor-patch,fused-blocks,compile",
        ),
        (["tune", "-n", "2"], "one or more of --min-psnr, --mean-psnr, --min-ssim, --max-flip, --"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(capsys, arguments, said):
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_help_names_every_preset(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in presets.NAMES)
