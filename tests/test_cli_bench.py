"""`fluxfire bench` as a command: what it writes, and what it refuses."""

from __future__ import annotations

import argparse
import json
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image

import fluxfire
from fluxfire.bench import plots, tables
from fluxfire.cli import main, values

SCHEMA = json.loads((Path(fluxfire.__file__).parent / "bench" / "schema.json").read_text())
QUICK = [
    "bench", "--model", "random-tiny", "--steps", "3", "--rounds", "1", "--baselines", "none",
    "--size", "32x32", "--no-ablation", "--passes", "qkv-fusion",
]  # fmt: skip


@pytest.fixture
def lines(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    file = tmp_path / "edits.jsonl"
    file.write_text('{"image": "a.png", "prompt": "make it blue"}\n{"prompt": "a red circle"}\n')
    return file


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """Let the compile-only control run eager: what compiling does is tested elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)


def run(tmp_path, *arguments):
    out = tmp_path / "bench.json"
    status = main([*QUICK, "--out", str(out), *arguments])
    return status, json.loads(out.read_text()) if out.exists() else None


def test_it_measures_and_writes_what_its_schema_says(tmp_path, lines, capsys):
    page = tmp_path / "bench.html"
    status, result = run(tmp_path, "--examples", str(lines), "--html", str(page))
    assert status == 0
    jsonschema.validate(result, SCHEMA)
    assert [r["contender"] for r in result["rows"]] == ["eager", "compile only", "qkv-fusion"]
    assert result["random_weights"] is True
    assert all(len(r["edit"]["seconds"]) == 2 for r in result["rows"])
    printed = capsys.readouterr().out
    assert "Speed" in printed
    assert "weights are random" in printed
    check_page(page.read_text())


def check_page(text):
    """Well-formed, with pictures, and nothing fetched from anywhere."""
    opened, addresses = [], []
    void = {"meta", "img", "br"}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            addresses.extend(v for k, v in attrs if k in ("src", "href", "xlink:href") and v)
            if tag not in void:
                opened.append(tag)

        def handle_startendtag(self, tag, attrs):
            addresses.extend(v for k, v in attrs if k in ("src", "href") and v)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    reader = Reader()
    reader.feed(text)
    assert opened == []
    assert sum(a.startswith("data:image/png") for a in addresses) >= 3
    assert all(a.startswith(("data:", "#")) for a in addresses)


@pytest.mark.parametrize("passes", ["qkv-fusion", "qkv-fusion,memory-layout"])
def test_without_ablation_the_whole_list_is_measured_alone(tmp_path, lines, passes):
    status, result = run(tmp_path, "--examples", str(lines), "--passes", passes)
    assert status == 0
    assert [r["contender"] for r in result["rows"]][2:] == [passes.replace(",", " + ")]


def test_spark_s_scenes_serve_any_model(tmp_path):
    """Their targets have another size than the pictures: nobody can tell if these are right."""
    status, result = run(tmp_path, "-n", "2")
    assert status == 0
    jsonschema.validate(result, SCHEMA)
    assert result["rows"][0]["quality"]["eager"]["success"] is None


def test_a_cache_on_random_weights_follows_spark(tmp_path, lines):
    status, result = run(
        tmp_path, "--examples", str(lines), "--passes", "qkv-fusion,first-block-cache"
    )
    assert status == 0
    row = result["rows"][-1]
    assert row["scheduled"]
    assert "schedule=(" in row["passes"][1]
    assert any("chosen on Spark" in note for note in result["notes"])
    assert "*" in tables.as_text(result)


def test_a_contender_that_fails_is_told_and_the_status_says_so(tmp_path, lines, capsys):
    passes = "memory-layout,qkv-fusion"  # the wrong way round cannot be stacked with compile
    status, result = run(
        tmp_path, "--examples", str(lines), "--passes", f"compile,{passes}", "--rounds", "1"
    )
    assert status == 1
    jsonschema.validate(result, SCHEMA)
    assert result["rows"][-1]["error"]
    assert "edit" in result["rows"][0]
    assert "compile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "/nowhere/bench.json"], "there is no folder /nowhere"),
        (["--html", "."], "it is a folder"),
        (["--plots", __file__], "it is not a folder"),
        (["--examples", "/nowhere.jsonl"], "cannot read examples from /nowhere.jsonl"),
        (["--image", "x.png"], "--image and --prompt go together"),
        (["--image", "/nowhere.png", "--prompt", "x"], "cannot read /nowhere.png"),
        (["--passes", "nonsense"], "there is no pass 'nonsense'"),
        (["--csv", "/nowhere/bench.csv"], "there is no folder /nowhere"),
        (["--csv", "x.json", "--html", "x.json"], "must name different files"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, arguments, said):
    assert run(tmp_path, *arguments)[0] == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--warmups", "-1"], "-1 is negative"),
        (["--size", "30x30"], "multiples of 16"),
        (["--baselines", "cache-dot"], "there is no baseline 'cache-dot'"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_argparse(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_results_are_not_overwritten(tmp_path, capsys):
    out, plots_before = tmp_path / "bench.json", tmp_path / "plots"
    out.write_text("[]")
    assert main([*QUICK, "--out", str(out)]) == 2
    assert "bench.json exists" in capsys.readouterr().err
    plots_before.mkdir()
    (plots_before / "old.svg").touch()
    assert main([*QUICK, "--plots", str(plots_before), "-o", str(tmp_path / "b.json")]) == 2
    assert "holds plots" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_full_size_needs_a_gpu(tmp_path, capsys):
    assert run(tmp_path, "--random-full")[0] == 2
    assert "there is none here" in capsys.readouterr().err


def test_plots_are_the_same_for_the_same_result(tmp_path, lines):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    status, result = run(tmp_path, "--examples", str(lines), "--plots", str(folder))
    assert status == 0
    drawn = plots.draw(result)
    assert drawn == plots.draw(result)
    assert len(drawn) == len(list(folder.glob("*.svg"))) == 3
    assert all(svg.lstrip().startswith("<?xml") for svg in drawn.values())


@pytest.mark.parametrize(
    "text",
    [
        "computed=1,reused=1,hit=1",
        "computed=1,reused=1,hit=1,around=inf",
        "computed=1,reused=1,hit=1,around=1,around=2",
        "computed=1,reused=1,hit=1,around=1,more",
        "computed=one,reused=1,hit=1,around=1",
        "computed=0,reused=1,hit=1,around=1",
    ],
)
def test_prices_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not computed=SECONDS,reused=SECONDS"):
        values.prices(text)


def test_prices():
    asked = "around=4,computed=1.5,reused=2,hit=3"
    assert values.prices(asked) == {"computed": 1.5, "reused": 2, "hit": 3, "around": 4}


def test_the_table_of_lossy_lists_and_the_csv(tmp_path, lines, capsys):
    """On random weights the cache follows Spark's schedule; fewer steps stand beside it anyway."""
    sheet, page = tmp_path / "bench.csv", tmp_path / "bench.html"
    status, result = run(
        tmp_path, "--examples", str(lines), "--passes", "first-block-cache", "--steps", "8",
        "--csv", str(sheet), "--html", str(page), "--plain-steps", "2,3",
    )  # fmt: skip
    assert status == 0
    jsonschema.validate(result, SCHEMA)
    names = [row["contender"] for row in result["rows"]]
    assert names[:5] == [
        "eager", "compile only", "first-block-cache", "plain, 2 steps", "plain, 3 steps",
    ]  # fmt: skip
    (fewer,) = names[5:]
    printed = capsys.readouterr().out
    assert "Lossy methods beside plain with fewer steps, at equal computed work" in printed
    assert result["rows"][2]["beside_fewer_steps"]["contender"] == fewer
    assert [row["steps"] for row in result["rows"][:5]] == [8, 8, 8, 2, 3]
    assert sheet.read_text().startswith("contender,")
    assert len(sheet.read_text().splitlines()) == 1 + len(names)
    assert fewer in page.read_text()


@pytest.mark.parametrize(("text", "found"), [("3", [3]), ("20,14,20", [20, 14])])
def test_counts(text, found):
    assert values.positive_numbers(text) == found


@pytest.mark.parametrize("text", ["", "3,", "3,zero", "0"])
def test_counts_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not"):
        values.positive_numbers(text)
