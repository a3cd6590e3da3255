"""The harness runs, restores, and counts right; its timings are nobody's assertion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from doubles import SkipBlock
from fluxfire.bench import Sample, Workload, load, measure_edits, repeat, save, stamp
from fluxfire.passes import FirstBlockCache, QKVFusion
from fluxfire.testing import edit

LOAD = Workload(name="tiny", width=32, height=32, steps=3, auto_resize=False, text_tokens=24)


def test_sample():
    facts = Sample.of([3.0, 1.0, 2.0]).to_dict()
    assert facts == {"median": 2.0, "min": 1.0, "max": 3.0, "seconds": [3.0, 1.0, 2.0]}
    with pytest.raises(ValueError, match="at least one"):
        Sample.of([])


def test_repeat_counts_its_calls():
    calls = []
    assert len(repeat(lambda: calls.append(1), warmups=2, repeats=3).seconds) == 3
    assert len(calls) == 5


def test_edits_are_measured_and_the_pipeline_is_plain_again(pipe, reference):
    seen = []
    picture = Image.new("RGB", (32, 32))
    stacks = {"eager": (), "fused": (QKVFusion(),)}
    rows = measure_edits(pipe, stacks, [LOAD], picture, rounds=2, on_rows=seen.append)
    assert [(r["stack"], r["workload"]["name"]) for r in rows] == [
        ("eager", "tiny"),
        ("fused", "tiny"),
    ]
    assert len(seen) == 4
    assert seen[-1] == rows
    for row in rows:
        assert len(row["step"]["seconds"]) == 2 * LOAD.steps
        assert len(row["edit"]["seconds"]) == len(row["first_seconds"]) == 2
        assert row["compiles"] == row["graph_breaks"] == 0
    assert np.array_equal(edit(pipe), reference)


def test_steps_that_hit_are_timed_apart(pipe):
    stacks = {"cached": (FirstBlockCache(schedule=[1]),)}
    loads = [LOAD, replace(LOAD, name="from words", reference=False)]
    rows = measure_edits(pipe, stacks, loads, Image.new("RGB", (32, 32)), rounds=2)
    for row in rows:
        assert row["hits"] == 1
        assert len(row["hit_step"]["seconds"]) == 2
        assert len(row["step"]["seconds"]) == 2 * (LOAD.steps - 1)
    with_reference, without = (r["workload"]["name"] for r in rows)
    assert (with_reference, without) == ("tiny", "from words")


def test_settings_differ_by_workload(pipe):
    stacks = {"plain": (), "cached": (FirstBlockCache(0),)}
    loads = [LOAD, replace(LOAD, name="other")]
    settings = {"cached": {"other": FirstBlockCache(schedule=[1])}}
    picture = Image.new("RGB", (32, 32))
    rows = measure_edits(pipe, stacks, loads, picture, rounds=1, settings=settings)
    assert [row["hits"] for row in rows] == [0, 0, 0, 1]
    assert "schedule=(1,)" in rows[-1]["settings"]


def test_a_crash_keeps_the_rows_before_it_and_restores(pipe, reference):
    class Crash(SkipBlock):
        def apply(self, tx):
            def fail(*_):
                raise RuntimeError("out of something")

            tx.wrap_blocks(fail)
            return super().apply(tx)

    seen = []
    with pytest.raises(RuntimeError, match="out of something"):
        measure_edits(
            pipe,
            {"eager": (), "crash": (Crash(),)},
            [LOAD],
            Image.new("RGB", (32, 32)),
            on_rows=seen.append,
        )
    assert [r["stack"] for r in seen[-1]] == ["eager"]
    assert np.array_equal(edit(pipe), reference)


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXFIRE_COMMIT", "abc")
    save({**stamp(), "x": 1}, tmp_path / "r.json")
    result = load(tmp_path / "r.json")
    assert result["commit"] == "abc"
    assert result["environment"]["packages"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
