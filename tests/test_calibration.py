"""Calibration: traces, proposals, and whole edits that decide."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from peft import LoraConfig
from PIL import Image

import fluxfire
from fluxfire.bench import Example, Workload, plots
from fluxfire.bench.calibration import calibrating
from fluxfire.bench.calibration.calibrating import calibrate, proposals
from fluxfire.bench.calibration.proposing import Bounds, Errors, propose, weights
from fluxfire.bench.calibration.recording import Recorder, Trace
from fluxfire.cli import main
from fluxfire.errors import BenchError, PlanError
from fluxfire.kontext import KONTEXT
from fluxfire.passes import FirstBlockCache, QKVFusion, Schedule
from fluxfire.passes.first_block_cache import _ResidualHistory
from fluxfire.planning import recipes
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


@given(seed=st.integers(0, 99), points=st.integers(1, 3))
def test_weights_predict_what_the_cache_predicts(seed, points):
    """From inner products alone, the damped line of `FirstBlockCache` in float64."""
    (walk, *_), (trace, *_) = random_traces(seed, 6)
    known, sigma = trace.sigmas[None, :points], trace.sigmas[None, 4]
    row = weights(known, sigma, trace.products[None, :points, :points])[0]
    newest_first = [(walk[i][None, None], trace.sigmas[i][None]) for i in reversed(range(points))]
    history = _ResidualHistory(*(list(part) for part in zip(*newest_first, strict=True)), [points])
    made = history.predict(sigma)[0, 0]
    assert torch.allclose(row @ walk[:points], made, rtol=1e-4, atol=1e-5)


def random_traces(seed, steps, n=3):
    """Residuals that wander, (steps, 8) each, and their traces; each has its own noise levels."""
    generator = torch.Generator().manual_seed(seed)
    walks, traces = [], []
    for _ in range(n):
        strides = 0.05 + torch.rand(steps, generator=generator, dtype=torch.float64)
        sigmas = strides.flip(0).cumsum(0).flip(0) / strides.sum()
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        walk = torch.randn(steps, 8, generator=generator, dtype=torch.float64).cumsum(0)
        distances = torch.rand(steps, steps, generator=generator, dtype=torch.float64)
        walks.append(walk)
        traces.append(Trace(sigmas, walk @ walk.T / 8, distances))
    return walks, traces


def predicted(levels, residuals, at):
    """Predict a residual by hand: the line through the last two, damped by the one before."""
    if len(levels) == 1:
        return residuals[0]
    slope = (residuals[-1] - residuals[-2]) / (levels[-1] - levels[-2])
    share = 1.0
    if len(levels) > 2:
        expected = (residuals[-2] - residuals[-3]) / (levels[-2] - levels[-3])
        share = min(1.0, max(0.0, float(slope @ expected / (expected @ expected))))
    return residuals[-1] + share * slope * (at - levels[-1])


def cost(walks, traces, computed, *, early):
    """What a schedule costs, from the residuals themselves."""
    total = 0.0
    mean_sigmas = torch.stack([t.sigmas for t in traces]).mean(0)
    for step in range(len(mean_sigmas) - 1):
        if step in computed:
            continue
        last = [c for c in computed if c < step][-3:]
        errors = []
        for walk, trace in zip(walks, traces, strict=True):
            levels, at = trace.sigmas[last].numpy(), float(trace.sigmas[step])
            made = predicted(levels, walk[last].numpy(), at)
            error = math.sqrt(float(np.mean((made - walk[step].numpy()) ** 2)))
            errors.append(float(trace.sigmas[step] - trace.sigmas[step + 1]) * error)
        total += float(mean_sigmas[step]) ** early * float(np.mean(errors))
    return total


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    warmup=st.integers(1, 3),
    cap=st.integers(1, 3),
    early=st.sampled_from([0.0, 1.0]),
)
def test_proposals_are_the_best_of_all_schedules(seed, warmup, cap, early):
    """Compared with trying every subset of the steps."""
    steps, tail = 8, 1
    walks, traces = random_traces(seed, steps)
    found = propose(Errors(traces), Bounds(warmup, tail, cap, early))
    best = {}
    middle = range(warmup, steps - tail)
    for n in range(len(middle) + 1):
        for some in itertools.combinations(middle, n):
            computed = sorted({*range(warmup), *some, *range(steps - tail, steps)})
            if max(b - a for a, b in itertools.pairwise(computed)) > cap + 1:
                continue
            price = cost(walks, traces, computed, early=early)
            best[len(computed)] = min(price, best.get(len(computed), math.inf))
    assert set(found) == set(best)
    for n, skipped in found.items():
        computed = [s for s in range(steps) if s not in skipped]
        assert len(computed) == n
        price = cost(walks, traces, computed, early=early)
        assert price == pytest.approx(best[n], rel=1e-6, abs=1e-9)


def test_candidates_keep_the_warm_up_and_have_limits_above_what_was_seen():
    _, traces = random_traces(5, 28)
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
        (
            {"computed": [10]},
            "10 computed steps of 10 are not possible; choose whole numbers from 4 to 9",
        ),
        ({"computed": [3]}, "3 computed steps of 10 are not possible"),
        ({"computed": [6.5]}, "6.5 computed steps of 10 are not possible; choose whole numbers"),
        ({"computed": ["6"]}, "'6' computed steps of 10 are not possible"),
        ({"computed": []}, "computed is empty"),
        ({"workload": replace(LOAD, steps=3)}, "nothing to skip in 3 steps"),
        ({"examples": [None] * 4}, "calibrate edits examples, such as"),
        ({"examples": [replace(EXAMPLES[0], instruction=["a", "b"])] * 4}, "one instruction each"),
        ({"seed": "a"}, "seed='a'; it must be a whole number of 0 or more"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(arguments, words):
    pipe = tiny_kontext()
    with pytest.raises(BenchError) as caught:
        calibrate(pipe, **({"examples": EXAMPLES, "workload": LOAD} | arguments))
    assert words in str(caught.value)
    with fluxfire.optimized(pipe, [QKVFusion()]), pytest.raises(PlanError):
        calibrate(pipe, EXAMPLES, workload=LOAD)


@pytest.mark.parametrize("steps", [4, 5, 7, 10, 20, 28, 50])
def test_every_number_of_computed_steps_that_is_allowed_is_possible(steps):
    _, traces = random_traces(1, steps)
    for wanted in (None, *([n] for n in range(steps + 2))):
        try:
            numbers = calibrating.budgets(wanted, steps)
        except BenchError:
            continue
        assert all(proposals(traces, n) for n in numbers)
    fewest = int(re.search(r"from (\d+)", str(refusal([0], steps))).group(1))
    bounds = Bounds(calibrating._scale(4, steps), 1, 4)
    assert fewest == min(propose(Errors(traces), bounds))


def refusal(computed, steps):
    with pytest.raises(BenchError) as caught:
        calibrating.budgets(computed, steps)
    return caught.value


def test_traces_that_mean_nothing_are_refused():
    _, (trace, *_) = random_traces(2, 8)
    for broken, words in (
        (replace(trace, products=trace.products * float("nan")), "not all finite"),
        (replace(trace, sigmas=trace.sigmas.clamp_max(0.5)), "do not fall at every step"),
    ):
        with pytest.raises(BenchError, match=words):
            Errors([trace, broken])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limits": {9: True}}, "step 9 has the limit True"),
        ({"limits": [(9, 0.3), (9, 0.4)]}, "limits has step 9 twice"),
        ({"limits": [9, 11]}, "give a mapping of steps to limits"),
        ({"limits": 9}, "give a mapping of steps to limits"),
    ],
)
def test_limits_that_are_none_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Schedule(28, **given)


def test_a_schedule_that_is_a_number_is_refused():
    with pytest.raises(ValueError, match=r"schedule=5; give the steps to skip, such as \[9, 11\]"):
        FirstBlockCache(schedule=5)


def test_a_limit_is_never_zero():
    """A limit of 0 would be no limit that `Schedule` takes."""
    _, traces = random_traces(3, 12)
    still = [replace(t, distances=t.distances * 0) for t in traces]
    for schedule in proposals(still, 8):
        assert all(limit > 0 for limit in schedule.by_step.values())


def _scaled(component, part=""):
    def change(pipe):
        for name, weight in getattr(pipe, component).named_parameters():
            if part in name:
                weight.data *= 1.5

    return change


def _adapted(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))


def _rescheduled(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=9.0)


CHANGES = {
    "one weight": _scaled("transformer", "single_transformer_blocks.0.proj_mlp.weight"),
    "the VAE": _scaled("vae"),
    "a text encoder": _scaled("text_encoder_2"),
    "a LoRA": _adapted,
    "the scheduler": _rescheduled,
}


def test_a_calibration_goes_on_where_an_interrupt_stopped_it(tmp_path):
    """It makes no edit twice, and finds what an undisturbed one finds."""
    folder = tmp_path / "kept"

    def found(pipe, on_edit=lambda _: None, **other):
        given = {"computed": [7, 5], "workload": LOAD, "folder": folder, "on_edit": on_edit}
        return calibrate(pipe, EXAMPLES, **(given | other))

    whole = found(tiny_kontext(), folder=None)
    for last in ("all steps, 5 of 6", "candidate 1", "confirming, 2"):

        def stop(what, last=last):
            if what.startswith(last):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            found(tiny_kontext(), on_edit=stop)
    with (folder / "edits.jsonl").open("a") as file:
        file.write('{"what": "cut sho')
    resumed = found(tiny_kontext())
    for one, other in zip(whole.found, resumed.found, strict=True):
        assert one.schedule == other.schedule
        assert one.quality.similarities == other.quality.similarities
        assert one.fewer.similarities == other.fewer.similarities
    pipe = tiny_kontext()
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    again = found(pipe)
    assert not calls
    assert again == resumed
    for other in (
        {"seed": 1}, {"passes": [QKVFusion()]}, {"workload": replace(LOAD, steps=12)},
    ):  # fmt: skip
        with pytest.raises(BenchError, match="holds the calibration of another model"):
            found(tiny_kontext(), **other)
    for change in CHANGES.values():
        pipe = tiny_kontext()
        change(pipe)
        with pytest.raises(BenchError, match="of another model"):
            found(pipe)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"precious")
    with pytest.raises(BenchError, match="holds other files"):
        calibrate(tiny_kontext(), EXAMPLES, workload=LOAD, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["cat.jpg"]


DAMAGE = {
    "no identity": ("calibration.json", "", "calibration.json is damaged"),
    "another identity": ("calibration.json", "{}", "calibration.json is damaged"),
    "a broken line": ("edits.jsonl", "{nothing}\n", "line 1 is damaged"),
    "a line of another kind": ("edits.jsonl", '{"what": "3 steps"}\n', "line 1 is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_told_by_name(tmp_path, damage):
    def found():
        return calibrate(
            tiny_kontext(), EXAMPLES[:4], computed=[6], workload=LOAD, folder=tmp_path / "kept"
        )

    whole = found()
    name, text, words = DAMAGE[damage]
    (tmp_path / "kept" / name).write_text(text)
    with pytest.raises(BenchError, match=words):
        found()
    assert whole.found


@pytest.mark.parametrize("file", ["plain-001.safetensors", "plain-001.png"])
def test_a_damaged_edit_is_made_again(tmp_path, file):
    def found():
        return calibrate(tiny_kontext(), EXAMPLES[:4], computed=[6], workload=LOAD, folder=tmp_path)

    whole = found()
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert found().found == whole.found


def test_a_folder_in_use_is_left_to_who_uses_it(tmp_path):
    """One calibration at a time: a second would write the same files, and slow the first down."""
    held = []

    def begin_another(what):
        if what.startswith("all steps, 2"):
            with pytest.raises(BenchError, match="another calibration uses"):
                calibrate(tiny_kontext(), EXAMPLES, workload=LOAD, folder=tmp_path)
            held.append(what)

    given = {"computed": [7], "workload": LOAD, "folder": tmp_path}
    calibrate(tiny_kontext(), EXAMPLES[:4], **given, on_edit=begin_another)
    assert held
    calibrate(tiny_kontext(), EXAMPLES[:4], **given)


def test_a_folder_that_is_a_file_is_told_by_name(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(BenchError, match="kept is a file"):
        calibrate(tiny_kontext(), EXAMPLES, workload=LOAD, folder=tmp_path / "kept")


def test_true_cfg_is_calibrated_with_both_branches():
    call = {"true_cfg_scale": 2.0, "negative_prompt": "blurry"}
    pipe, seen = tiny_kontext(), []
    pipe.transformer.register_forward_hook(lambda *_: seen.append(1))
    calibrate(pipe, EXAMPLES[:4], computed=[6], workload=replace(LOAD, call=call))
    both = len(seen)
    seen.clear()
    calibrate(pipe, EXAMPLES[:4], computed=[6], workload=LOAD)
    assert both >= 1.9 * len(seen)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"sigmas": [1.0, 0.5]}, "cannot have sigmas: they would fix the number of steps"),
        ({"num_inference_steps": 4}, r"cannot have num_inference_steps: use Workload\(steps=…\)"),
        ({"generator": None}, "cannot have generator: each example has a seed of its own"),
        ({"width": 64, "height": 64}, r"cannot have height: use Workload\(size="),
        ({"num_images_per_prompt": 2}, "each edit makes one picture"),
        ({"callback_on_step_end": print}, "which no result could hold"),
        ({"mask_image": EXAMPLES[0].picture}, "cannot have mask_image=Image"),
    ],
)
def test_an_argument_that_a_workload_sets_or_no_result_can_hold_is_refused(call, words):
    with pytest.raises(BenchError, match=words):
        Workload(name="x", call=call)


def test_references_of_two_shapes_are_warmed_up_both():
    pipe, sized = tiny_kontext(), replace(LOAD, size=(32, 32), auto_resize=True)
    wide, tall = (Example("x", Image.new("RGB", size)) for size in ((64, 32), (32, 64)))
    assert sized.of_each_size(pipe, [wide, tall, wide]) == [wide, tall]
    assert replace(sized, auto_resize=False).of_each_size(pipe, [wide, tall]) == [wide]


def test_what_is_unusable_is_told_after_one_edit():
    pipe, said = tiny_kontext(), []
    pipe.transformer.single_transformer_blocks[1].proj_out.weight.data[0] = float("nan")
    with pytest.raises(BenchError, match="not all finite"):
        calibrate(pipe, EXAMPLES, workload=LOAD, on_edit=said.append)
    assert len([what for what in said if what.startswith("all steps")]) == 1


def test_a_schedule_that_saves_no_work_never_wins(monkeypatch):
    """Limits that overrule every skip leave a plain edit, which beats plain with one step less."""
    monkeypatch.setattr("fluxfire.bench.calibration.proposing._SLACK", 1e-9)
    monkeypatch.setattr("fluxfire.bench.calibration.proposing._LEAST_LIMIT", 1e-9)
    found = calibrate(tiny_kontext(), [*EXAMPLES, *EXAMPLES], computed=[6], workload=LOAD)
    (one,) = found.found
    assert one.overruled == 1
    assert one.work > 9
    assert not one.wins
    with pytest.raises(BenchError, match="no schedule clearly beats"):
        found.best()


def test_offloaded_weights_are_no_obstacle(tmp_path):
    pipe = tiny_kontext()
    cpu_offload(pipe.transformer, torch.device("cpu"))
    found = calibrate(pipe, EXAMPLES[:4], computed=[6], workload=LOAD, folder=tmp_path)
    assert found.found


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


@pytest.mark.parametrize("beats", [True, False])
def test_the_command(tmp_path, capsys, monkeypatch, beats):
    """The verdict is given here: random weights have none."""
    monkeypatch.setattr("fluxfire.cli.calibrate.load_model", lambda _: tiny_kontext())
    verdict = property(lambda self: beats and self.steps < 8)
    monkeypatch.setattr("fluxfire.bench.trials.FewerStepsComparison.beats_fewer_steps", verdict)
    lines = []
    for i, example in enumerate([*EXAMPLES, *EXAMPLES][:10]):
        example.picture.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": example.instruction}))
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    out = tmp_path / "found.json"
    command = [
        "calibrate", "--examples", str(tmp_path / "edits.jsonl"), "--passes", "none", "-o",
        str(out), "--steps", "8", "--size", "32x32", "--folder", str(tmp_path / "kept"),
    ]  # fmt: skip
    plot = tmp_path / "found.svg"
    asked = [*command, "--computed", "7", "5", "--plot", str(plot)]
    assert main(asked) == (0 if beats else 1)
    assert plot.read_text().startswith("<?xml")
    shown = capsys.readouterr()
    assert "7 of 8" in shown.out
    assert "5 of 8" in shown.out
    assert out.exists() == beats
    if beats:
        assert "which computes 5 steps" in shown.err
        (cache,) = recipes.read(out)
        assert len(cache.limits(8)) == 3
        assert cache.limits(9) is None
    else:
        assert "nothing was saved" in shown.out
    (tmp_path / "edits.jsonl").write_text("\n".join(lines[:9]))
    assert main([*command, "--overwrite"]) == 2
    assert "has 9 examples; calibrate needs 10" in capsys.readouterr().err


def test_the_plot_shows_schedules_beside_fewer_steps():
    def measured(mean):
        return {"psnr": {"mean": mean, "worst": mean - 9, "interval": [mean - 1, mean + 2]}}

    found = [
        {"work": 16.2, "quality": measured(48), "fewer_steps": {"steps": 17, **measured(42)}},
        {"work": 13.3, "quality": measured(45), "fewer_steps": {"steps": 14, **measured(39)}},
    ]
    axes = Figure().subplots()
    plots._schedules(axes, found)
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    for points in (
        ([13.3, 16.2], [45, 48]), ([13.3, 16.2], [36, 39]),
        ([14, 17], [39, 42]), ([14, 17], [30, 33]),
    ):  # fmt: skip
        assert points in drawn
    result = {"workload": {"name": "edit"}, "confirming": 8, "found": found}
    drawn = plots.draw_calibration(result)
    assert drawn == plots.draw_calibration(result)


@pytest.mark.parametrize(
    ("name", "words"), [("plot.png", "must end in .svg"), ("there.svg", "exists")]
)
def test_a_plot_that_cannot_be_written_is_refused_before_any_edit(tmp_path, capsys, name, words):
    (tmp_path / "there.svg").touch()
    assert main(["calibrate", "--plot", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err
