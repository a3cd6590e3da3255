"""Calibration: traces, proposals, and whole edits that decide."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fluxfire
from fluxfire.bench import Example, Workload
from fluxfire.bench.calibration.calibrating import calibrate, proposals
from fluxfire.bench.calibration.proposing import Bounds, Errors, propose, weights
from fluxfire.bench.calibration.recording import Recorder, Trace
from fluxfire.errors import BenchError, PlanError
from fluxfire.kontext import KONTEXT
from fluxfire.passes import FirstBlockCache, QKVFusion, Schedule
from fluxfire.testing import edit, tiny_kontext

STEPS = 6
LOAD = Workload(name="tiny", size=(32, 32), steps=10, auto_resize=False, text_tokens=24)
EXAMPLES = [Example("make it blue", Image.new("RGB", (32, 32), (9 * i, 9, 200))) for i in range(6)]


def recorded(pipe, **call):
    """Edit with a recorder, and with hooks that note what each block returns."""
    seen = []
    blocks = KONTEXT.blocks(pipe.transformer)
    handles = [
        blocks[i].register_forward_hook(lambda *a, i=i: seen.append((i, a[-1])))
        for i in (0, len(blocks) - 1)
    ]
    recorder = Recorder()
    with fluxfire.optimized(pipe, [recorder]):
        picture = edit(pipe, **call)
        noise = fluxfire.report(pipe).runs[-1].tokens.noise
    for handle in handles:
        handle.remove()
    return picture, recorder.traces, seen, noise


def test_a_trace_holds_the_products_of_what_the_blocks_added():
    pipe = tiny_kontext()
    plain = edit(pipe, steps=STEPS)
    picture, (trace,), seen, noise = recorded(pipe, steps=STEPS)
    assert np.array_equal(picture, plain)
    image = [out[1][:, :noise].double() for _, out in seen]
    rests = torch.stack([(image[2 * k + 1] - image[2 * k]).flatten() for k in range(STEPS)])
    expected = rests @ rests.T / rests.shape[1]
    assert torch.allclose(trace.products, expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(trace.products, trace.products.mT)
    assert trace.sigmas.shape == (STEPS + 1,)
    assert trace.sigmas[-1] == 0
    assert (trace.sigmas.diff() < 0).all()


def test_distances_are_those_that_the_cache_measures():
    """With step 2 skipped, the cache compares step 2 with step 1, and step 3 with step 1."""
    pipe = tiny_kontext()
    *_, traces, _, _ = recorded(pipe, steps=STEPS)
    cache = FirstBlockCache(schedule=Schedule(STEPS, {2: 1e9, 3: 1e9}), distance="noise")
    with fluxfire.optimized(pipe, [cache]):
        edit(pipe, steps=STEPS)
        measured = {
            d.step: d.distances[0] for d in fluxfire.report(pipe).runs[-1].decisions if d.distances
        }
    assert measured[2] == pytest.approx(float(traces[0].distances[2, 1]), rel=1e-4)
    # Step 3's input differs a little, since step 2's prediction is not exact.
    assert measured[3] == pytest.approx(float(traces[0].distances[3, 1]), rel=0.2)


def test_every_sample_and_branch_leaves_a_trace_and_an_interrupted_run_none():
    pipe, recorder = tiny_kontext(), Recorder()

    def interrupt(_pipe, step, _time, inputs):
        if step == 2:
            raise KeyboardInterrupt
        return inputs

    with fluxfire.optimized(pipe, [recorder]):
        edit(pipe, steps=STEPS, prompt=["red", "blue"], true_cfg_scale=2.0, negative_prompt="grey")
        assert len(recorder.traces) == 4
        alone, *_ = recorder.traces
        with pytest.raises(KeyboardInterrupt):
            edit(pipe, steps=STEPS, callback_on_step_end=interrupt)
        assert len(recorder.traces) == 4
        with fluxfire.using(pipe, recorder.off()):
            edit(pipe, steps=STEPS)
        assert len(recorder.traces) == 4
        edit(pipe, steps=STEPS)
        assert len(recorder.traces) == 5
    assert alone.products.shape == (STEPS, STEPS)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True).filter(
        lambda xs: all(abs(a - b) > 0.01 for a, b in itertools.combinations(xs, 2))
    ),
    st.floats(0, 1),
)
def test_weights_are_those_of_the_polynomial(known, sigma):
    for power in range(len(known)):
        exact = sigma**power
        got = sum(w * x**power for w, x in zip(weights(known, sigma), known, strict=True))
        assert got == pytest.approx(exact, rel=1e-6, abs=1e-6)


def random_traces(seed, steps, n=3):
    generator = torch.Generator().manual_seed(seed)
    sigmas = torch.rand(steps, generator=generator, dtype=torch.float64).sort(descending=True)[0]
    sigmas = torch.cat([sigmas + 0.05 * torch.arange(steps, 0, -1), torch.zeros(1)]).double()
    made = []
    for _ in range(n):
        walk = torch.randn(steps, 8, generator=generator, dtype=torch.float64).cumsum(0)
        made.append((walk, Trace(sigmas, walk @ walk.T / 8, torch.rand(steps, steps))))
    return sigmas, [w for w, _ in made], [t for _, t in made]


def cost(sigmas, walks, computed, *, points, early):
    """What a schedule costs, from the residuals themselves."""
    total = 0.0
    for step in range(len(sigmas) - 1):
        if step in computed:
            continue
        last = [c for c in computed if c < step][-points:]
        x = sigmas[last].numpy()
        errors = []
        for walk in walks:
            line = np.polyfit(x, walk[last].numpy(), len(last) - 1)
            predicted = sum(
                c * float(sigmas[step]) ** k for k, c in enumerate(reversed(list(line)))
            )
            errors.append(math.sqrt(float(np.mean((predicted - walk[step].numpy()) ** 2))))
        stride = float(sigmas[step] - sigmas[step + 1])
        total += float(sigmas[step]) ** early * stride * float(np.mean(errors))
    return total


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99), points=st.sampled_from([1, 2]), warmup=st.integers(1, 3),
    cap=st.integers(1, 3), early=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_proposals_are_the_best_of_all_schedules(seed, points, warmup, cap, early):
    """Compared with trying every subset of the steps."""
    steps, tail = 8, 1
    sigmas, walks, traces = random_traces(seed, steps)
    found = propose(Errors(traces, points), Bounds(warmup, tail, cap, early))
    best = {}
    middle = range(warmup, steps - tail)
    for n in range(len(middle) + 1):
        for some in itertools.combinations(middle, n):
            computed = sorted({*range(warmup), *some, *range(steps - tail, steps)})
            if max(b - a for a, b in itertools.pairwise(computed)) > cap + 1:
                continue
            price = cost(sigmas, walks, computed, points=points, early=early)
            best[len(computed)] = min(price, best.get(len(computed), math.inf))
    assert set(found) == set(best)
    for n, skipped in found.items():
        computed = [s for s in range(steps) if s not in skipped]
        assert len(computed) == n
        price = cost(sigmas, walks, computed, points=points, early=early)
        assert price == pytest.approx(best[n], rel=1e-6, abs=1e-9)


def test_candidates_keep_the_warm_up_and_have_limits_above_what_was_seen():
    _, _, traces = random_traces(5, 28)
    candidates = proposals(traces, 14)
    assert 1 < len(candidates) == len(set(candidates))
    for schedule in candidates:
        assert len(schedule.by_step) == 14
        assert min(schedule.by_step) >= 4
        assert max(schedule.by_step) < 27
        for step, limit in schedule.by_step.items():
            last = max(s for s in range(step) if s not in schedule.by_step)
            farthest = max(float(t.distances[step, last]) for t in traces)
            assert farthest < limit < 2 * farthest + 1e-3


def test_a_calibrated_list_from_the_first_edit_to_the_file(tmp_path):
    pipe, said = tiny_kontext(), []
    plain = edit(pipe, steps=10)
    found = calibrate(
        pipe, EXAMPLES, passes=[QKVFusion()], computed=[7, 5], workload=LOAD, on_edit=said.append
    )
    assert np.array_equal(edit(pipe, steps=10), plain)
    assert fluxfire.report(pipe).passes == ()
    assert [one.computed for one in found.found] == [7, 5]
    assert (found.calibrating, found.confirming) == (3, 3)
    for one in found.found:
        assert len(one.schedule.by_step) == 10 - one.computed
        assert len(one.quality.similarities) == len(one.fewer.similarities) == 3
        assert one.comparison.steps >= one.computed
        assert 0 <= one.overruled <= 1
    assert len([s for s in said if s.startswith("all steps")]) == 6
    assert "7 of 10" in str(found)
    file = tmp_path / "calibrated.json"
    found.save(file, computed=5)
    fluxfire.optimize(pipe, str(file))
    edit(pipe, steps=10)
    run = fluxfire.report(pipe).runs[-1]
    assert [p.name for p in fluxfire.report(pipe).passes] == ["qkv-fusion", "first-block-cache"]
    skipped = [d.step for d in run.decisions if d.hits[0]]
    assert set(skipped) <= set(found.best(5).schedule.by_step)
    assert json.loads(file.read_text())["calibrated"]["confirming"] == 3


def test_a_cache_of_the_list_gives_way_to_the_schedule():
    found = calibrate(
        tiny_kontext(), EXAMPLES[:4], passes=[FirstBlockCache()], computed=[6], workload=LOAD
    )
    assert found.passes == ()
    assert [type(p) for p in found.list_of(6)] == [FirstBlockCache]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"examples": EXAMPLES[:3]}, "needs 4 examples or more"),
        ({"computed": [10]}, "10 computed steps of 10 are not possible; choose 3 to 9"),
        ({"computed": [2]}, "2 computed steps of 10 are not possible"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(arguments, words):
    pipe = tiny_kontext()
    with pytest.raises(BenchError) as caught:
        calibrate(pipe, **({"examples": EXAMPLES, "workload": LOAD} | arguments))
    assert words in str(caught.value)
    with fluxfire.optimized(pipe, [QKVFusion()]), pytest.raises(PlanError):
        calibrate(pipe, EXAMPLES, workload=LOAD)


def test_a_number_without_a_schedule_is_refused():
    found = calibrate(tiny_kontext(), EXAMPLES[:4], computed=[6], workload=LOAD)
    with pytest.raises(BenchError, match="no schedule computes 7 steps; there are 6"):
        found.best(7)


def test_the_pipeline_is_plain_after_an_interrupt():
    pipe = tiny_kontext()
    plain = edit(pipe, steps=4)

    def stop(what):
        if what.startswith("candidate"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, EXAMPLES, computed=[6], workload=LOAD, on_edit=stop)
    assert fluxfire.report(pipe).passes == ()
    assert np.array_equal(edit(pipe, steps=4), plain)
