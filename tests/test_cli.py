"""The command line, as a user types it."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxfire import presets
from fluxfire.bench import baselines, quality
from fluxfire.cli import bench, catalog, console, main, values
from fluxfire.cli import options as options_module
from fluxfire.cli import run as cli_run
from fluxfire.errors import PictureError
from fluxfire.passes.mega_cache import machine
from fluxfire.passes.shared import artifact_file
from fluxfire.pictures import read_picture
from fluxfire.planning import registry
from fluxfire.testing import tiny_kontext

HAS_SERVE = importlib.util.find_spec("uvicorn") is not None


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
    facts = json.loads(run(capsys, "passes", "--json")[1])
    assert [f["name"] for f in facts[:2]] == ["attention", "compile"]
    assert facts[0]["exactness"] == ["close", "lossy"]
    assert {f["plugin"] for f in facts} == {None}


@pytest.mark.parametrize("name", registry.built_in())
def test_what_the_command_line_reads_of_a_pass_is_what_its_class_says(name):
    cls, facts = registry.built_in()[name], catalog.own_passes()[name]
    assert (facts.class_name, facts.stage, facts.slot) == (cls.__name__, cls.stage, cls.slot)
    assert facts.summary == cls.__doc__.partition("\n")[0]
    assert registry.make(name).exactness in facts.exactness


@pytest.mark.parametrize("name", registry.built_in())
def test_one_pass_is_described_as_its_class_is(capsys, name):
    cls = registry.built_in()[name]
    status, out, _ = run(capsys, "passes", name)
    assert (status, out.partition(":")[0]) == (0, f"{cls.__name__} ({name})")
    assert inspect.getdoc(cls) in out
    own = [field.name for field in fields(cls) if field.init]
    assert re.findall(r"^    (\w+): .+", out.partition("\nSettings:")[2], re.MULTILINE) == own
    assert run(capsys, "passes", cls.__name__)[1] == out
    told = json.loads(run(capsys, "passes", name, "--json")[1])
    assert (told["name"], len(told["settings"])) == (name, len(own))


def test_a_pass_that_is_not_there_cannot_be_described(capsys):
    status, _, err = run(capsys, "passes", "qkv")
    assert (status, err) == (2, "error: there is no pass 'qkv'; did you mean 'qkv-fusion'?\n")


def test_names_that_the_command_line_knows_without_torch():
    assert list(catalog.own_passes()) == list(registry.built_in())
    assert catalog.presets() == presets.NAMES
    assert bench.BASELINES == baselines.NAMES
    assert values.HIGHEST_PSNR == quality.EQUAL


def test_plan(capsys):
    status, out, _ = run(capsys, "plan")
    assert status == 0
    assert "fused-blocks    blocks       close      ready" in out
    status, out, _ = run(capsys, "plan", "--passes", "compile,qkv-fusion")
    assert status == 1
    assert "must come before compile" in out
    assert "qkv-fusion  weights  close      error: see below" in out
    _, _, err = run(capsys, "plan", "--passes", "compile,qkv-fuson")
    assert "there is no pass 'qkv-fuson'; did you mean 'qkv-fusion'?" in err
    _, out, err = run(capsys, "plan", "--preset", "qkv-fusion,compile")
    assert "did you mean --passes qkv-fusion,compile?" in err
    _, out, err = run(capsys, "plan", "--passes", "compile,qkv-fusion")
    assert "On the command line: --passes qkv-fusion,compile" in err
    _, out, _ = run(capsys, "plan", "--preset", "fast")
    own = "threshold=0.15, warmup_steps=6, schedule=(Schedule(20, "
    assert f"settings: FirstBlockCache({own}" in out


def test_plan_as_json(capsys):
    status, out, _ = run(capsys, "plan", "--passes", "compile,qkv-fusion", "--json")
    plan = json.loads(out)
    assert (status, plan["ok"]) == (1, False)
    assert plan["passes"][0]["name"] == "compile"
    assert "must come before compile" in plan["problems"][0]
    assert [p["configuration"] for p in plan["suggestion"]] == ["QKVFusion()", "Compile()"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs alone")
def test_the_default_compiles_nothing_on_a_cpu(capsys):
    status, out, err = run(capsys, "plan", "--json")
    assert status == 0
    assert [p["name"] for p in json.loads(out)["passes"]] == ["inductor-patch", "fused-blocks"]
    assert "--preset faithful includes it" in err
    _, out, err = run(capsys, "plan", "--json", "--preset", "faithful")
    assert json.loads(out)["passes"][-1]["name"] == "compile"
    assert err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs alone")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "balanced"], "balanced includes compile: on a CPU it takes minutes"),
        (["--passes", "compile"], ""),
        (["--passes", "qkv-fusion"], ""),
        ([], "the default leaves out compile: on a CPU it takes minutes"),
    ],
)
def test_before_a_preset_compiles_on_a_cpu_it_says_how_long_that_takes(capsys, options, said):
    preset, passes = (dict([options or ("", "")]).get(name) for name in ("--preset", "--passes"))
    assert options_module.selected_passes(SimpleNamespace(preset=preset, passes=passes))
    err = capsys.readouterr().err
    assert said in err
    assert bool(said) == bool(err)


def test_the_duration_of_many_edits_is_estimated_once(capsys, monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    shown = []
    show = console.estimate_once(shown.append, 376, "edits", "more follow")
    for text in ("round 1 of 2: plain", "plain: 1 of 376", "plain: 2 of 376", "plain: 3 of 376"):
        show(text)
    assert capsys.readouterr().err == "376 edits: about 13 min; more follow\n"
    assert len(shown) == 4


def test_the_progress_bar_says_that_something_compiles(capsys):
    with console.edits_bar(compiles=True) as show:
        show("edit 1")
        torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    assert "edit 1: compiling, once; may take minutes [0" in capsys.readouterr().err
    with console.announce_compilation():
        for shift in (2, 3):
            torch.compile(lambda x, shift=shift: x + shift, backend="eager")(torch.zeros(2))
    assert capsys.readouterr().err.count("compiling, once; may take minutes") == 1


def test_doctor(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "torch " in out
    assert "GPU " in out
    assert re.search(r"^memory-layout +applies", out, re.MULTILINE)
    facts = json.loads(run(capsys, "doctor", "--json")[1])
    assert facts["environment"]["packages"]["torch"] == torch.__version__
    assert facts["passes"]["memory-layout"]["ok"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs alone")
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (None, "not set; set it to passive"),
        ("active", "active; set it to passive"),
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
        "--seed", 7, "--json",
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
    assert f"saved {output} (64x48) in " in err


def test_run_speaks_to_artists_first_and_to_engineers_on_request(capsys, photo, tmp_path):
    arguments = [
        "run", "--image", photo, "--prompt", "make it night", "--steps", 3, "--size", "32x32",
        "--passes", "first-block-cache", "-o", tmp_path / "out.png", "--overwrite",
    ]  # fmt: skip
    _, out, _ = run(capsys, *arguments)
    assert re.fullmatch(rf"saved {tmp_path}/out.png \(32x32\) in [\d.]+ m?s\n", out)
    _, out, _ = run(capsys, *arguments, "-v")
    assert "generation  noise+reference+text tokens" in out


def test_the_summary_of_a_run():
    compiled = SimpleNamespace(trace_seconds=1.0, compile_seconds=40.0)
    kinds = ["computed"] * 5 + ["hit"] * 2 + ["reused"]
    ran = SimpleNamespace(compiled=compiled, step_kinds=kinds)
    assert cli_run._summary(50.0, ran) == (
        "50 s, including 41 s to compile once; 2 of 8 steps skipped; "
        "the reference reused in 1 of 8 steps"
    )
    assert cli_run._summary(1.9, None) == "1.9 s"


def test_no_file_is_overwritten_unless_asked(capsys, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit = [
        "run", "--image", photo, "--prompt", "x", "--passes", "none", "--steps", 1,
        "--size", "32x32",
    ]  # fmt: skip
    link, other = tmp_path / "link.jpg", tmp_path / "other.png"
    link.symlink_to(photo)
    os.link(photo, tmp_path / "hard.jpg")
    before = read_picture(photo).tobytes()
    for output in (photo, link, tmp_path / "hard.jpg", "./in.jpg", f"../{tmp_path.name}/in.jpg"):
        status, _, err = run(capsys, *edit, "-o", output, "--overwrite")
        assert status == 2
        assert "it is an input of this command" in err
    assert read_picture(photo).tobytes() == before
    other.write_text("precious")
    status, _, err = run(capsys, *edit, "-o", other)
    assert (status, other.read_text()) == (2, "precious")
    assert "other.png exists; name another file, or add --overwrite" in err
    assert run(capsys, *edit, "-o", other, "--overwrite")[0] == 0
    assert read_picture(other).size == (32, 32)
    for made in ("out.png", "out-2.png"):
        assert run(capsys, *edit)[1].startswith(f"saved {made} ")


def test_the_seed_decides(capsys, photo, tmp_path):
    pictures = []
    for seed in (1, 1, 2):
        output = tmp_path / "out.png"
        run(
            capsys, "run", "--image", photo, "--prompt", "x", "--passes", "qkv-fusion",
            "--size", "32x32", "--steps", 2, "--seed", seed, "-o", output, "--overwrite",
        )  # fmt: skip
        pictures.append(np.asarray(Image.open(output)))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_guidance_and_true_cfg_reach_the_pipeline(capsys, photo, tmp_path, monkeypatch):
    calls = []
    load = lambda _, **__: recording(tiny_kontext(), calls)  # noqa: E731
    monkeypatch.setattr("fluxfire.cli.run.load_model", load)
    edit = ["run", "--image", photo, "--prompt", "x", "--passes", "none", "--steps", 1]
    edit += ["--size", "32x32", "-o", tmp_path / "out.png", "--overwrite"]
    names = ("guidance_scale", "true_cfg_scale", "negative_prompt")
    for options, expected in (
        ([], {}),
        (["--guidance", 2.5], {"guidance_scale": 2.5}),
        (
            ["--true-cfg", 3, "--negative-prompt", "blurry"],
            {"true_cfg_scale": 3.0, "negative_prompt": "blurry"},
        ),
    ):
        assert run(capsys, *edit, *options)[0] == 0
        assert {name: value for name, value in calls[-1].items() if name in names} == expected


def recording(pipe, calls):
    """Return a pipeline that notes the arguments of its calls."""
    kind = type(pipe)

    def call(self, *args, **kwargs):
        calls.append(kwargs)
        return kind.__call__(self, *args, **kwargs)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipe


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
    assert status == 2
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
        ["run", "--image", "a", "--prompt", "b", "--size", "100x64"],
        ["run", "--image", "a", "--prompt", "b", "--guidance", "0"],
        ["run", "--image", "a", "--prompt", "b", "--guidance", "nan"],
        ["run", "--image", "a", "--prompt", "b", "--size", "160000x160000"],
        ["run", "--image", "a", "--prompt", "\udcff"],
        ["run", "--image", "a", "--prompt", ""],
        ["run", "--image", "a", "--prompt", "b", "--true-cfg", "2", "--negative-prompt", "\udcff"],
        ["demo", "--image", "a", "--prompt", " \n"],
        ["bisect", "--min-psnr", "-5"],
        ["tune", "--max-lost", "2"],
        ["serve", "--port", "70000"],
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
    assert "edit a picture with an optimized pipeline" in said
    assert all(name in said for name in ("passes", "plan", "doctor", "run", "tune", "serve"))


def test_megacache(capsys, tmp_path):
    file = tmp_path / "m"
    assert run(capsys, "megacache", "verify", file)[0] == 2
    artifact_file.add(
        file, [artifact_file.Payload({"gpu": "H100"}, ("1+2+3",), 2.5, "now", b"xyz")], None
    )
    status, out, _ = run(capsys, "megacache", "inspect", file)
    assert status == 0
    for words in ("payload 0", "H100", "1+2+3", "2.5 s", "m is intact, and only you can"):
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
    assert f"fluxfire would not use {file}: it can be written by other users" in err
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1])
    status, out, err = run(capsys, "megacache", "verify", file)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: fluxfire would not use {file}: it is damaged")


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
    assert main([*arguments, "-o", str(tmp_path / "o.png")]) == 2
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
    assert main(["demo", "--passes", "nonsense"]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "-n", "1000000"], "-n 1000000 is more than 5000"),
        (["bisect", "--example", "1000000"], "--example 1000000 is past the last scene, 4999"),
        (["plan", "--preset", "faithfull"], "did you mean 'faithful'?"),
        (["plan", "--passes", "qkv,compile"], "no pass 'qkv'; did you mean 'qkv-fusion'?"),
        (["plan", "--passes", "me"], "there is no pass 'me'; there are attention"),  # two begin so
        (["plan", "--passes", "QKVFuson"], "there is no pass 'QKVFuson'; there are attention"),
        (["plan", "--preset", "nowhere.json"], "cannot read passes from nowhere.json"),
        (["demo", "--examples", "nowhere.jsonl"], "cannot read examples from nowhere.jsonl"),
        (["doctor", "--model", "."], "it has no model_index.json"),
        (
            ["plan", "--passes", "faithful,qkv-fusion"],
            "'faithful' is a preset, not a pass; write --preset faithful",
        ),
        (["calibrate", "-n", "9"], "calibrate needs 10 examples or more"),
        (["calibrate", "--true-cfg", "2"], "--true-cfg and --negative-prompt go together"),
        (["tune", "--min-psnr", "30", "--negative-prompt", "x"], "go together"),
        (
            ["bench", "--true-cfg", "1", "--negative-prompt", "x"],
            "--true-cfg 1 changes nothing: give a scale above 1",
        ),
        (["calibrate", "-o", "x.txt"], "must be a file ending in .json"),
        (["calibrate", "--model", "random-tiny"], "whose steps say nothing"),
        (["tune", "-n", "9"], "one or more of --min-psnr, --mean-psnr, --min-ssim, --max-flip, --"),
        (["tune", "-n", "2", "--min-psnr", "30"], "tune needs 3 examples or more"),
        (["tune", "--min-psnr", "30", "-o", "x.txt"], "must be a file ending in .json"),
        (["tune", "--min-psnr", "30", "--model", "random-tiny"], "pictures are noise"),
        (["megacache", "verify", "nowhere"], "cannot read nowhere: No such file"),
        pytest.param(
            ["serve", "--host", "0.0.0.0"],
            "so the service needs keys",
            marks=pytest.mark.skipif(not HAS_SERVE, reason="needs the extra serve"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_list_that_cannot_be_applied_is_a_failure(capsys):
    assert main(["demo", "--passes", "compile,qkv-fusion"]) == 1
    assert "Nothing was changed" in capsys.readouterr().err


def test_an_empty_prompt_in_a_file_is_refused(capsys, tmp_path):
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "a red circle"}\n{"prompt": " "}\n')
    assert main(["demo", "--examples", str(file), "-o", str(tmp_path / "demo.png")]) == 2
    assert "the prompt of example 2 is empty" in capsys.readouterr().err


WITHOUT_TORCH = {
    0: ["passes", "passes --json", "--help", "--version", "run --help", "serve --new-key ann"],
    2: [
        "",
        "dance",
        "run",
        "demo --image x",
        "demo --image nowhere.png --prompt x",
        "demo --image PHOTO --prompt x -o PHOTO",
        "demo -n 1000000",
        "demo --examples nowhere.jsonl",
        "run --image PHOTO --prompt x -o no/such/x.png",
        "run --image PHOTO --prompt x -o x.doc",
        "run --image PHOTO --prompt x --size 100x64",
        "run --image PHOTO --prompt x --passes nonsense",
        "run --image PHOTO --prompt x --passes faithful",
        "run --image PHOTO --prompt x --preset nonsense",
        "run --image PHOTO --prompt x --preset nowhere.json",
        "run --image PHOTO --prompt x --preset no-list.json",
        "run --image PHOTO --prompt x --model ./nowhere",
        "plan --passes nonsense",
        "doctor --model nowhere",
        "bench --csv x.json --html x.json",
        "bench --baselines cache-dot",
        "bench --out /nowhere/bench.json",
        "tune",
        "tune --min-psnr 200",
        "calibrate -n 4",
        "calibrate --model random-tiny",
        "tune --min-psnr 20 -n 2",
        "tune --min-psnr 20 --model random-tiny",
        "bisect --example 1000000",
        "bisect --image x",
        "megacache verify nowhere",
        "serve --preset nonsense",
        *(["serve --host 0.0.0.0"] if HAS_SERVE else ()),
    ],
}  # by exit status


def test_facts_and_usage_errors_come_without_torch(photo, tmp_path):
    code = """
import contextlib, io, json, sys
from fluxfire.cli import main
found = {}
for line in sys.argv[2:]:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = main([sys.argv[1] if a == "PHOTO" else a for a in line.split()])
    except SystemExit as error:
        status = error.code or 0
    found[line] = [status, "torch" in sys.modules]
    sys.modules.pop("torch", None)
print(json.dumps(found))
"""
    (tmp_path / "no-list.json").write_text("[")
    lines = [line for some in WITHOUT_TORCH.values() for line in some]
    done = subprocess.run(
        [sys.executable, "-c", code, photo, *lines],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    wanted = {line: [status, False] for status, some in WITHOUT_TORCH.items() for line in some}
    assert json.loads(done.stdout) == wanted


def test_completion(tmp_path):
    """As a shell asks for it: the names of passes after a comma."""
    pytest.importorskip("argcomplete")
    line = "fluxfire plan --passes qkv-fusion,first"
    told = tmp_path / "told"
    environment = os.environ | {
        "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(told),
    }  # fmt: skip
    command = [sys.executable, "-m", "fluxfire"]
    subprocess.run(command, env=environment, check=False, capture_output=True)
    assert told.read_text().strip() == "qkv-fusion,first-block-cache"


def test_help_names_every_preset(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in presets.NAMES)
