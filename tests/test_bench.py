"""The harness runs, restores, and counts right; its timings are nobody's assertion."""

from __future__ import annotations

import csv
import io
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fluxfire
from doubles import SkipBlock
from fluxfire.bench import (
    Contender,
    Example,
    Sample,
    Workload,
    controls,
    ladder,
    load_result,
    measure,
    measuring,
    repeat,
    save_result,
    stamp,
)
from fluxfire.bench.phases import phases
from fluxfire.bench.tables import as_csv, as_text
from fluxfire.bench.work import BlockCounter, Work
from fluxfire.errors import BenchError, PlanError
from fluxfire.kontext import KONTEXT
from fluxfire.passes import Compile, FirstBlockCache, FusedBlocks, QKVFusion
from fluxfire.testing import edit, tiny_kontext

LOAD = Workload(name="tiny", size=(32, 32), steps=3, auto_resize=False, text_tokens=24)


def test_sample():
    facts = Sample.of([3.0, 1.0, 2.0]).to_dict()
    assert facts == {"median": 2.0, "min": 1.0, "max": 3.0, "seconds": [3.0, 1.0, 2.0]}
    with pytest.raises(ValueError, match="at least one"):
        Sample.of([])


def test_repeat_counts_its_calls():
    calls = []
    assert len(repeat(lambda: calls.append(1), warmups=2, repeats=3).seconds) == 3
    assert len(calls) == 5


EXAMPLES = [Example("make it blue", Image.new("RGB", (32, 32), c)) for c in ("red", "teal")]


def test_contenders_are_measured_and_the_pipeline_is_plain_again(pipe, reference):
    seen, told = [], []
    contenders = [Contender("eager", (), "control"), Contender("fused", (QKVFusion(),))]
    rows = measure(
        pipe, contenders, [LOAD], EXAMPLES, rounds=2, on_rows=seen.append, on_edit=told.append
    )
    assert [(r.contender.name, r.workload.name) for r in rows] == [
        ("eager", "tiny"),
        ("fused", "tiny"),
    ]
    assert [r.contender.name for r in seen[0]] == ["eager"]
    assert len(told) == 2 * 2 * (1 + len(EXAMPLES))  # eager came last: it need not run again
    for row in (r.to_dict() for r in rows):
        assert len(row["step"]["seconds"]) == 4 * LOAD.steps
        assert len(row["edit"]["seconds"]) == 4
        assert len(row["first_seconds"]) == 2
        assert row["compiles"] == row["graph_breaks"] == 0
        assert set(row["phases"]) == {
            "text encoding",
            "reference encoding",
            "denoising",
            "decoding",
            "the rest",
        }
        spent = [sum(p["seconds"][i] for p in row["phases"].values()) for i in range(4)]
        assert spent == pytest.approx(row["edit"]["seconds"])
    assert np.array_equal(edit(pipe), reference)


def test_pictures_are_judged_beside_the_controls(pipe):
    contenders = [*controls(), Contender("skip", (SkipBlock(),))]
    contenders[1] = Contender("compile only", (), "control")  # as if it had been compiled
    eager, compiled, skip = measure(pipe, contenders, [LOAD], EXAMPLES, rounds=1, fewer_steps=False)
    expected = [LOAD.run(pipe, e, seed=i) for i, e in enumerate(EXAMPLES)]
    for picture, wanted in zip(eager.pictures.values(), expected, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    assert [one.psnr for one in compiled.quality["eager"].similarities] == [100, 100]
    assert set(skip.quality) == {"eager", "compile only"}
    assert max(one.psnr for one in skip.quality["eager"].similarities) < 99


def test_examples_are_checked_where_a_program_can(pipe):
    examples = [
        replace(EXAMPLES[0], check=lambda _: True),
        replace(EXAMPLES[1], check=lambda _: False),
    ]
    (row,) = measure(pipe, [Contender("eager")], [LOAD], [*examples, EXAMPLES[0]], rounds=1)
    assert row.right == [True, False, None]
    assert row.to_dict()["quality"]["eager"]["success"] == 0.5


def test_steps_that_hit_are_timed_apart(pipe):
    contenders = [Contender("cached", (FirstBlockCache(schedule=[1]),))]
    loads = [LOAD, replace(LOAD, name="from words", reference=False)]
    rows = measure(pipe, contenders, loads, EXAMPLES[:1], rounds=2, fewer_steps=False)
    for row in (r.to_dict() for r in rows):
        assert row["hits"] == 1
        assert len(row["hit_step"]["seconds"]) == 2
        assert len(row["step"]["seconds"]) == 2 * (LOAD.steps - 1)


def test_settings_differ_by_workload(pipe):
    cached = Contender(
        "cached", (FirstBlockCache(0),), settings={"other": FirstBlockCache(schedule=[1])}
    )
    loads = [LOAD, replace(LOAD, name="other")]
    contenders = [Contender("plain"), cached]
    rows = measure(pipe, contenders, loads, EXAMPLES[:1], rounds=1, fewer_steps=False)
    told = [row.to_dict() for row in rows]
    assert [row["hits"] for row in told] == [0, 0, 0, 1]
    assert "schedule=(1,)" in told[-1]["settings"]


class Crash(SkipBlock):
    def apply(self, tx):
        def fail(*_):
            raise RuntimeError("out of something")

        tx.wrap_blocks(fail)
        return super().apply(tx)


def test_a_crash_is_told_and_the_others_go_on(pipe, reference):
    contenders = [Contender("eager"), Contender("crash", (Crash(),)), Contender("after")]
    rows = measure(pipe, contenders, [LOAD, replace(LOAD, name="two")], EXAMPLES, rounds=2)
    told = {(r.contender.name, r.workload.name): r.to_dict() for r in rows}
    assert told["crash", "tiny"]["error"] == "RuntimeError: out of something"
    assert told["crash", "two"]["error"] == "not run, after tiny failed"
    assert "edit" not in told["crash", "tiny"]
    assert len(told["after", "two"]["edit"]["seconds"]) == 4
    assert np.array_equal(edit(pipe), reference)


def test_what_is_interrupted_keeps_the_rows_before_it(pipe, reference):
    class Interrupt(SkipBlock):
        def apply(self, tx):
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        measure(
            pipe,
            [Contender("eager"), Contender("interrupted", (Interrupt(),))],
            [LOAD],
            EXAMPLES,
            on_rows=seen.append,
        )
    assert [r.contender.name for r in seen[-1]] == ["eager"]
    assert np.array_equal(edit(pipe), reference)


def test_the_ladder_has_controls_each_pass_and_the_stack():
    passes = (QKVFusion(), FirstBlockCache(), Compile())
    assert [c.name for c in ladder(passes)] == [
        "eager",
        "compile only",
        "qkv-fusion alone",
        "first-block-cache alone",
        "qkv-fusion + first-block-cache",
        "qkv-fusion + first-block-cache + compile",
    ]
    assert [c.name for c in ladder(())] == ["eager", "compile only"]
    own = Compile(dynamic=True)
    assert ladder((own,))[1].passes == (own,)


def test_warming_up_can_be_part_of_what_counts(pipe):
    (row,) = measure(pipe, [Contender("eager")], [LOAD], EXAMPLES * 5, rounds=1, warmups=0)
    told = row.to_dict()
    assert told["first_seconds"] == []
    assert len(told["edit"]["seconds"]) == 10


def test_turns_go_forwards_and_backwards(pipe):
    told = []
    contenders = [Contender(name) for name in ("a", "b")]
    measure(pipe, contenders, [LOAD], EXAMPLES[:1], rounds=3, on_edit=told.append)
    turns = [said.split(": ")[1] for said in told if "," not in said]
    assert turns == ["a", "b", "b", "a", "a", "b", "a"]  # the first once more at the end


def test_every_size_is_warmed_up(pipe):
    """Pictures of two shapes at the pipeline's own sizes; the first run told is the first one."""
    pipe.reference_size = lambda w, h: (w, h)
    load = Workload(name="own sizes", steps=1, auto_resize=False, text_tokens=24)
    shapes = [Example("x", Image.new("RGB", size)) for size in ((32, 32), (48, 32), (32, 32))]
    assert load.of_each_size(pipe, shapes) == shapes[:2]
    (row,) = measure(pipe, [Contender("eager")], [load], shapes, rounds=1)
    assert len(row.first) == 1
    assert [p.size for p in row.pictures.values()] == [(32, 32), (48, 32), (32, 32)]


def test_of_many_examples_the_worst_pictures_are_kept(pipe):
    contenders = [Contender("eager", (), "control"), Contender("skip", (SkipBlock(),))]
    eager, skip = measure(
        pipe, contenders, [LOAD], EXAMPLES * 2, rounds=2, keep=3, fewer_steps=False
    )
    assert sorted(eager.pictures) == [0, 1, 2, 3]
    assert list(skip.pictures) == [skip.quality["eager"].worst]
    assert len(skip.quality["eager"].similarities) == 4


def test_a_picture_of_another_size_is_that_contenders_fault(pipe):
    class Other(Workload):
        def run(self, pipe, example, **rest):
            made = super().run(pipe, example, **rest)
            return made.resize((16, 16)) if fluxfire.report(pipe).passes else made

    load = Other(
        **{f: getattr(LOAD, f) for f in ("name", "size", "steps", "auto_resize", "text_tokens")}
    )
    contenders = [
        Contender("eager", (), "control"),
        Contender("other", (QKVFusion(),)),
        Contender("last"),
    ]
    rows = measure(pipe, contenders, [load], EXAMPLES, rounds=1)
    assert [bool(row.error) for row in rows] == [False, True, False]
    assert "cannot be compared" in rows[1].error
    assert "(failed later)" in as_text({"rows": [r.to_dict() for r in rows], "notes": []})


@pytest.mark.parametrize(
    ("contenders", "loads", "examples", "said"),
    [
        ([], [LOAD], EXAMPLES, "there is no contender"),
        ([Contender("a")] * 2, [LOAD], EXAMPLES, "two contenders are called 'a'"),
        ([Contender("a")], [], EXAMPLES, "there is no workload"),
        ([Contender("a")], [LOAD, LOAD], EXAMPLES, "two workloads are called 'tiny'"),
        ([Contender("a")], [LOAD], [], "there is no example"),
    ],
)
def test_what_cannot_be_measured_is_refused(pipe, contenders, loads, examples, said):
    with pytest.raises(BenchError, match=said):
        measure(pipe, contenders, loads, examples)


def test_a_pipeline_that_is_not_plain_is_refused(pipe):
    fluxfire.optimize(pipe, [QKVFusion()])
    with pytest.raises(PlanError, match="plain pipeline"):
        measure(pipe, [Contender("eager")], [LOAD], EXAMPLES)


def test_a_later_failure_leaves_what_was_measured(pipe):
    class Failing(Workload):
        def run(self, pipe, example, **rest):
            raise RuntimeError("out of something")

    bad = Failing(name="bad", size=(32, 32), steps=3)
    loads = [LOAD, bad, replace(LOAD, name="third")]
    rows = measure(pipe, [Contender("eager")], loads, EXAMPLES, rounds=2)
    assert [row.error for row in rows] == [
        None,
        "RuntimeError: out of something",
        "not run, after bad failed",
    ]
    assert len(rows[0].edits) == 2


def test_a_commit_is_that_of_the_measured_code(tmp_path, monkeypatch):
    monkeypatch.delenv("FLUXFIRE_COMMIT", raising=False)
    monkeypatch.chdir(tmp_path)
    here = stamp()["commit"]
    subprocess.run(["git", "init", "-q", "."], check=True)
    assert stamp()["commit"] == here  # whatever repository one happens to stand in


def test_phases_leave_no_trace(pipe):
    before = dict(vars(pipe.vae))
    with pytest.raises(RuntimeError), phases(pipe) as watched:
        LOAD.run(pipe, EXAMPLES[0])
        raise RuntimeError
    assert set(watched.seconds()) == {"text encoding", "reference encoding", "decoding"}
    assert vars(pipe.vae) == before
    assert "encode_prompt" not in vars(pipe)


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXFIRE_COMMIT", "abc")
    save_result({**stamp(), "x": 1}, tmp_path / "r.json")
    result = load_result(tmp_path / "r.json")
    assert result["commit"] == "abc"
    assert result["environment"]["packages"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


SKIPPING = FirstBlockCache(schedule=[2, 3, 5, 6, 7])


def test_a_lossy_list_stands_beside_plain_at_equal_work(pipe, reference):
    """Three of eight steps computed, and five hits of one block in five: four steps of work."""
    load = replace(LOAD, steps=8)
    contenders = [Contender("eager", (), "control"), Contender("cached", (SKIPPING,))]
    eager, cached, fewer = measure(pipe, contenders, [load], EXAMPLES, rounds=2)
    assert fewer.contender == Contender("plain, 4 steps", (), "fewer steps", steps=4)
    assert (cached.twin, cached.fewer_steps_name, cached.fewer_steps_row) == (
        "eager",
        "plain, 4 steps",
        fewer,
    )
    assert {len(edit.steps) for edit in fewer.edits} == {4}
    assert {len(edit.steps) for edit in (*eager.edits, *cached.edits)} == {8}
    for number, example in enumerate(EXAMPLES):
        wanted = LOAD.run(pipe, example, seed=number, steps=4)
        assert np.array_equal(np.asarray(fewer.pictures[number]), np.asarray(wanted))
    facts = cached.to_dict()
    assert facts["work"] == pytest.approx(3 + 5 / 5)
    assert facts["skipped"] == 5
    beside = facts["beside_fewer_steps"]
    ours, theirs = ([one.psnr for one in r.quality["eager"].similarities] for r in (cached, fewer))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert beside["psnr"]["mean"] == pytest.approx(np.mean(gaps))
    assert beside["psnr"]["low"] <= beside["psnr"]["mean"] <= beside["psnr"]["high"]
    assert facts["beside_fewer_steps"]["steps"] == 4
    assert eager.to_dict()["beside_fewer_steps"] is None
    assert np.array_equal(edit(pipe), reference)


def test_the_twin_is_the_same_list_without_what_is_lossy(pipe):
    load = replace(LOAD, steps=8)
    contenders = [
        Contender("eager", (), "control"),
        Contender("cached", (QKVFusion(), SKIPPING)),
        Contender("exact", (QKVFusion(vae=False),)),
    ]
    rows = measure(pipe, contenders, [load], EXAMPLES[:1], rounds=1)
    assert [(r.contender.name, r.contender.passes, r.steps) for r in rows] == [
        ("eager", (), 8),
        ("qkv-fusion", (QKVFusion(),), 8),
        ("cached", (QKVFusion(), SKIPPING), 8),
        ("exact", (QKVFusion(vae=False),), 8),
        ("plain, 4 steps (qkv-fusion)", (QKVFusion(),), 4),
    ]
    assert rows[2].twin == "qkv-fusion"
    assert rows[4].quality["qkv-fusion"].worst_psnr < 100


def test_a_list_that_computes_every_step_has_no_such_row_and_says_so(pipe):
    contenders = [Contender("eager", (), "control"), Contender("idle", (FirstBlockCache(),))]
    rows = measure(pipe, contenders, [LOAD], EXAMPLES, rounds=1)
    assert [row.contender.name for row in rows] == ["eager", "idle"]
    told = as_text({"rows": [row.to_dict() for row in rows], "notes": []})
    assert "3 of 3 (skipped none)" in told
    assert "note: idle never skipped a step of 3" in told


def test_lists_that_differ_in_steps_share_a_turn(pipe):
    told = []
    contenders = [
        Contender("eager", (), "control"),
        Contender("cached", (SKIPPING,)),
        Contender("plain", ()).with_steps(2),
    ]
    measure(pipe, contenders, [replace(LOAD, steps=8)], EXAMPLES[:1], on_edit=told.append)
    assert "round 1 of 2: plain, 2 steps, tiny: 1 of 1" in told
    turns = [said for said in told if ", tiny: " not in said]
    assert turns == [
        "round 1 of 2: plain and plain, 2 steps",
        "round 1 of 2: cached",
        "round 1 of 2: plain, 4 steps",
        "round 2 of 2: cached",
        "round 2 of 2: plain, 4 steps and plain, 2 steps and plain",
    ]


def test_settings_of_a_workload_count_as_lossy(pipe):
    cached = Contender("cached", (FirstBlockCache(0),), settings={"tiny": SKIPPING})
    rows = measure(pipe, [Contender("eager"), cached], [replace(LOAD, steps=8)], EXAMPLES[:1])
    assert [row.contender.name for row in rows] == ["eager", "cached", "plain, 4 steps"]


def row_of(median, again):
    load = {"name": "tiny", "steps": 3}
    sample = {"median": median, "min": median, "max": median, "seconds": [median]}
    return {
        "contender": "eager",
        "workload": load,
        "steps": 3,
        "error": None,
        "edit": sample,
        "moved": again / median - 1,
        "may_skip": False,
        "skipped": 0,
        "scheduled": False,
        "step": None,
        "hits": 0,
        "first_seconds": [],
        "peak_gib": 0,
        "joules": None,
        "utilisation": None,
        "phases": {},
        "quality": {},
        "twin": None,
    }


@pytest.mark.parametrize(("again", "busy"), [(1.04, False), (1.06, True), (0.94, True)])
def test_a_busy_machine_is_told(again, busy):
    told = as_text({"rows": [row_of(1.0, again)], "notes": []})
    assert ("this machine was busy" in told.splitlines()[0]) == busy
    assert ("note: this machine was busy: the median edit of plain moved" in told) == busy


@pytest.mark.parametrize("repeated", [None, 1])
def test_the_first_contender_runs_again_at_the_end(pipe, monkeypatch, repeated):
    """Each run takes a second longer than the one before it."""
    clock = iter(range(1, 100))
    monkeypatch.setattr(measuring, "time_call", lambda run: (run(), float(next(clock))))
    for rounds, expected in ((1, [1, 2, 5, 6]), (2, [1, 2, 7, 8])):
        clock = iter(range(1, 100))
        contenders = [Contender("eager"), Contender("fused", (QKVFusion(),))]
        eager, _ = measure(pipe, contenders, [LOAD], EXAMPLES, rounds=rounds, repeated=repeated)
        first, last = expected[:2], expected[2:]
        assert [edit.seconds for edit in eager.edits[:2]] == first
        assert eager.again == last[:repeated]
        assert eager.moved == np.median(last[:repeated]) / np.median(first[:repeated]) - 1


def test_as_csv(pipe):
    contenders = [Contender("eager", (), "control"), Contender("cached, once", (SKIPPING,))]
    rows = measure(pipe, contenders, [replace(LOAD, steps=8)], EXAMPLES, rounds=1)
    result = {"rows": [row.to_dict() for row in rows]}
    lines = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert [line["contender"] for line in lines] == ["eager", "cached, once", "plain, 4 steps"]
    assert float(lines[1]["edit_seconds"]) == result["rows"][1]["edit"]["median"]
    assert float(lines[1]["psnr_worst"]) == rows[1].quality["eager"].worst_psnr
    assert lines[1]["fewer_steps"] == "4"
    assert lines[0]["fewer_steps"] == lines[0]["hit_seconds"] == ""
    beside = result["rows"][1]["beside_fewer_steps"]["psnr"]
    assert float(lines[1]["beside_fewer_low"]) == beside["low"]


def test_a_twin_that_stands_later_runs_first(pipe):
    load = replace(LOAD, steps=8)
    contenders = [
        Contender("eager", (), "control"),
        Contender("cached", (QKVFusion(), SKIPPING)),
        Contender("fused", (QKVFusion(),)),
    ]
    rows = measure(pipe, contenders, [load], EXAMPLES, rounds=1)
    assert [r.contender.name for r in rows[:3]] == ["eager", "fused", "cached"]
    assert rows[2].to_dict()["beside_fewer_steps"]["contender"] == "plain, 4 steps (fused)"


def test_a_companion_is_never_another_contender_of_its_name(pipe):
    load = replace(LOAD, steps=8)
    impostor = Contender("plain, 4 steps", (SkipBlock(),))
    contenders = [Contender("eager", (), "control"), Contender("cached", (SKIPPING,)), impostor]
    rows = measure(pipe, contenders, [load], EXAMPLES, rounds=1)
    cached = next(r for r in rows if r.contender.name == "cached")
    assert cached.fewer_steps_name == "plain, 4 steps of eager"
    assert (cached.fewer_steps_row.contender.passes, cached.fewer_steps_row.steps) == ((), 4)


def test_work_that_rounds_up_to_all_steps_stands_beside_one_step_less(pipe):
    """7 steps and a hit of one block in five: 7.2 steps of work."""
    one = Contender("cached", (FirstBlockCache(schedule=[5]),))
    rows = measure(pipe, [Contender("eager"), one], [replace(LOAD, steps=8)], EXAMPLES, rounds=1)
    assert rows[1].fewer_steps_name == "plain, 7 steps"


def test_an_error_on_leaving_a_contender_is_its_own(pipe):
    class BadUndo(SkipBlock):
        def apply(self, tx):
            def fail():
                raise RuntimeError("cannot undo")

            tx.on_undo(fail)
            return super().apply(tx)

    contenders = [Contender("eager"), Contender("bad", (BadUndo(),))]
    _, bad = measure(pipe, contenders, [LOAD], EXAMPLES, rounds=1, fewer_steps=False)
    assert "cannot undo" in bad.error


def test_counting_blocks_leaves_passes_at_work_and_no_trace():
    """A hook on a norm would make FusedBlocks step aside."""
    pipe = tiny_kontext()
    with fluxfire.optimized(pipe, [FusedBlocks()]):
        expected = edit(pipe)
        before = [dict(vars(b)) for b in KONTEXT.blocks(pipe.transformer)]
        with BlockCounter(pipe) as counter:
            assert np.array_equal(edit(pipe), expected)
        assert [dict(vars(b)) for b in KONTEXT.blocks(pipe.transformer)] == before
    (runs,) = {len(calls) for calls in counter._tokens}
    assert counter.work(4) == Work(runs, 4 - runs)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_block_that_runs_on_part_of_the_tokens_counts_that_part(pipe, replaced):
    blocks = KONTEXT.blocks(pipe.transformer)
    width = pipe.transformer.inner_dim
    if replaced:  # as a hook of diffusers does
        for block in blocks:
            block.forward = block.forward
    with BlockCounter(pipe) as counter, torch.no_grad():
        for image in (24, 8, 0):
            for block in blocks if image else blocks[:1]:
                block(
                    hidden_states=torch.randn(1, image or 24, width),
                    encoder_hidden_states=torch.randn(1, 8, width),
                    temb=torch.randn(1, width),
                )
    joint = len(pipe.transformer.transformer_blocks)
    # The norm of a joint block has the image's tokens alone.
    part = (joint * 8 / 24 + (len(blocks) - joint) * 0.5) / len(blocks) if replaced else 0.5
    assert counter.work(3).steps == pytest.approx(1 + part + 1 / len(blocks))
    assert counter.work(3).skipped == 2


def test_in_a_shared_turn_one_contender_s_failure_is_its_own(pipe):
    class Failing(Workload):
        def run(self, pipe, example, *, steps=None, **rest):
            if steps == 3:
                raise RuntimeError("three")
            return super().run(pipe, example, steps=steps, **rest)

    facts = {f: getattr(LOAD, f) for f in ("size", "auto_resize", "text_tokens")}
    loads = [Failing(name=name, steps=4, **facts) for name in ("one", "two")]
    plain = Contender("eager", (), "control")
    contenders = [plain.with_steps(3), plain, plain.with_steps(2)]
    rows = measure(pipe, contenders, loads, EXAMPLES, rounds=2)
    told = {(r.contender.name, r.workload.name): (r.error, len(r.edits)) for r in rows}
    assert told["plain, 3 steps", "one"] == ("RuntimeError: three", 0)
    assert told["plain, 3 steps", "two"] == ("not run, after one failed", 0)
    for name in ("eager", "plain, 2 steps"):
        for load in ("one", "two"):
            assert told[name, load] == (None, 4)
