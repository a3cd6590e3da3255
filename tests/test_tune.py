"""The search finds what trying everything finds; budgets and saved lists say what they mean."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import fluxfire
from doubles import SkipBlock
from fluxfire import presets
from fluxfire.bench import (
    Budget,
    Example,
    Family,
    Prices,
    Workload,
    fewer_steps,
    search,
    tune,
)
from fluxfire.bench.calibration.calibrating import schedule_family
from fluxfire.bench.calibration.recording import Recorder
from fluxfire.bench.quality import Quality, Similarity
from fluxfire.bench.tuning import cache_families
from fluxfire.cli import main
from fluxfire.errors import BenchError, PlanError
from fluxfire.passes import Compile, FirstBlockCache, MegaCache, QKVFusion, ReferenceCache, Schedule
from fluxfire.planning import recipes
from fluxfire.runtime.conductor import conductor_of
from fluxfire.testing import edit, tiny_kontext

KNOB = tuple(FirstBlockCache(t) for t in (0.1, 0.2, 0.3, 0.4, 0.5))
MANY = [Example("make it blue", Image.new("RGB", (32, 32), (9 * i, 9, 200))) for i in range(15)]
EXAMPLES = MANY[:6]
LOAD = Workload(name="tiny", size=(32, 32), steps=8, auto_resize=False, text_tokens=24)
PIPE = tiny_kontext()


@dataclass(frozen=True)
class Pretended(Workload):
    """Pictures that are as far from the plain ones as a table says."""

    damage: tuple[tuple[int, ...], ...] = ()  # by index, by example: levels of grey

    def run(self, pipe, example, *, seed=0, steps=None):
        index = index_of(pipe)
        number = EXAMPLES.index(example)
        shift = 0 if index is None else self.damage[index][number]
        return Image.new("RGB", (8, 8), (100 + shift,) * 3)


def index_of(pipe):
    """Where the knob stands; None for the plain pipeline, or with the cache switched off."""
    conductor = conductor_of(pipe)
    settings = conductor.live[0].settings if conductor and conductor.live else None
    return KNOB.index(settings) if settings in KNOB else None


def psnr(shift):
    return 100.0 if shift == 0 else 20 * np.log10(255 / shift)


@pytest.fixture
def clock(monkeypatch):
    """A step further on the knob is a tenth faster."""

    def timed(run):
        index = index_of(PIPE)
        return run(), 1.0 if index is None else 0.9 ** (index + 1)

    monkeypatch.setattr(search, "time_call", timed)


@pytest.fixture
def counted_time(monkeypatch):
    """Let an edit take as long as it computes, so that no other program decides what is faster."""

    def timed(run):
        picture, own = run(), run.func.__self__
        runs = fluxfire.report(own.pipe).runs
        kinds = runs[-1].step_kinds if runs else ["computed"] * own.workload.steps
        return picture, float(kinds.count("computed"))

    monkeypatch.setattr(search, "time_call", timed)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.lists(st.integers(0, 60), min_size=6, max_size=6), min_size=5, max_size=5),
    st.sampled_from([20.0, 28.0, 40.0]),
)
def test_the_search_finds_what_trying_everything_finds(clock, steps, least):
    damage = np.cumsum(steps, axis=0)  # no example gets better further on the knob
    load = Pretended(name="pretended", damage=tuple(map(tuple, damage.tolist())))
    found = tune(
        PIPE, EXAMPLES, Budget(min_psnr=least), candidates=[Family((KNOB[0],), KNOB)], workload=load
    )
    within = [r for r, row in enumerate(damage) if all(psnr(d) >= least for d in row)]
    assert found.passes == ((KNOB[within[-1]],) if within else ())
    assert found.confirmed.examples == found.plain.examples == 2
    assert found.speed == pytest.approx(1 / 0.9 ** len(within))
    assert found.attempts == sum(t.part == "confirm" for t in found.trials)
    assert conductor_of(PIPE) is None


def test_what_is_found_keeps_its_budget_when_run_again(counted_time, tmp_path):
    """Judged by the saved list, a fresh pipeline and arithmetic in float64."""
    pipe = tiny_kontext()
    knob = tuple(FirstBlockCache(t) for t in (0.05, 0.2, 0.3, 0.33, 0.4, 10.0))
    candidates = [Family((QKVFusion(), knob[0]), knob)]
    worst = {}
    for cache in knob:
        with fluxfire.optimized(tiny_kontext(), [cache]) as other:
            worst[cache] = min(values(other, MANY, 0))
    budget = Budget(min_psnr=sorted(set(worst.values()))[1] - 1)  # not met by all, nor by none
    found = tune(pipe, MANY, budget, candidates=candidates, workload=LOAD)
    assert found.confirmed.verdict == "within"
    found.save(tmp_path / "tuned.json")
    again = fluxfire.optimize(tiny_kontext(), str(tmp_path / "tuned.json"))
    held_out = list(values(again, MANY[10:], 10))
    assert min(held_out) >= budget.min_psnr
    assert found.confirmed.quality.worst_psnr == pytest.approx(min(held_out), abs=1e-3)
    namespace = {}
    exec(found.to_python(), namespace)
    assert namespace["passes"] == list(found.passes) == list(recipes.read(tmp_path / "tuned.json"))


def values(pipe, examples, seed):
    """PSNR to the plain pipeline, in float64."""
    plain = tiny_kontext()
    for number, example in enumerate(examples, seed):
        made, wanted = (
            np.asarray(LOAD.run(p, example, seed=number), np.float64) for p in (pipe, plain)
        )
        error = np.square((made - wanted) / 255).mean()
        yield 100.0 if error == 0 else min(100.0, -10 * np.log10(error))


def test_lost_edits_count(clock):
    """Each index loses one more of the two that confirm."""

    def example(number):
        source = EXAMPLES[number]
        return replace(source, check=lambda p: p.getpixel((0, 0))[0] < 100 + 10 * (number + 1))

    examples = [example(i) for i in range(6)]
    damage = ((0,) * 6, (0, 0, 0, 0, 55, 0), (0, 0, 0, 0, 55, 65), (9,) * 6, (9,) * 6)

    class Load(Pretended):
        def run(self, pipe, example, **rest):
            return super().run(pipe, EXAMPLES[examples.index(example)], **rest)

    load = Load(name="pretended", damage=damage)
    candidates = [Family((KNOB[0],), KNOB[:3])]
    for most, index in ((0.0, 0), (0.5, 1), (1.0, 2)):
        found = tune(PIPE, examples, Budget(max_lost=most), candidates=candidates, workload=load)
        assert found.passes == (KNOB[index],), most
        assert found.attempts == 3 - index
        assert found.plain.quality.success == 1
        lost = f"plain pipeline gets {index} more of 2 edits right: --max-lost {most:g} allows that"
        assert (lost in str(found)) == (index > 0)
        assert "does not limit" not in str(found)
        assert f"  {1 - index / 2:.1%} (100.0%)  " in str(found), most
    found = tune(PIPE, examples, Budget(min_psnr=1), candidates=candidates, workload=load)
    assert (
        "The plain pipeline gets 2 more of 2 edits right: this budget does not limit that; "
        "--max-lost 0.01 (max_lost=0.01 in Python) allows one in a hundred"
    ) in str(found)


def test_the_fastest_of_what_was_tried_is_returned(clock):
    """One family is turned back below another that was within the budget from the start."""
    damage = ((0,) * 6, (0,) * 6, (0, 0, 9, 0, 0, 0), (0, 0, 90, 0, 0, 0), (0, 0, 90, 0, 0, 0))
    load = Pretended(name="pretended", damage=damage)
    families = [Family((KNOB[0],), KNOB), Family((KNOB[0],), KNOB[1:3])]
    found = tune(PIPE, EXAMPLES, Budget(min_psnr=28), candidates=families, workload=load)
    assert found.passes == (KNOB[2],)
    assert found.speed == pytest.approx(1 / 0.9**3)


def test_what_is_hardly_faster_is_not_worth_a_loss(monkeypatch):
    def timed(run):
        return run(), 1.0 if index_of(PIPE) is None else 0.99

    monkeypatch.setattr(search, "time_call", timed)
    load = Pretended(name="pretended", damage=((1,) * 6,) * 5)
    candidates = [Family((KNOB[0],), KNOB)]
    found = tune(PIPE, EXAMPLES, Budget(min_psnr=28), candidates=candidates, workload=load)
    assert found.passes == ()
    assert "Nothing faster than the plain pipeline" in str(found)


def test_a_candidate_that_fails_is_told_and_left_out(clock):
    class Failing(Pretended):
        def run(self, pipe, example, **rest):
            if index_of(pipe) in (2, 4):
                raise RuntimeError("out of something")
            return super().run(pipe, example, **rest)

    load = Failing(name="pretended", damage=((0,) * 6,) * 5)
    families = [Family((KNOB[0],), KNOB), Family((KNOB[0],), KNOB[:2])]
    found = tune(PIPE, EXAMPLES, Budget(min_psnr=28), candidates=families, workload=load)
    assert found.passes == (KNOB[1],)
    assert "failed: RuntimeError: out of something" in str(found)
    assert conductor_of(PIPE) is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_edit_that_compiled_is_not_timed(monkeypatch):
    """As where a second size compiles in the midst of what counts."""
    runs = []

    def timed(run):
        picture = run()
        if conductor_of(PIPE) is None:
            return picture, 1.0
        runs.append(SimpleNamespace(compiles=not runs, tokens=None, step_kinds=["computed"] * 8))
        return picture, 50.0 if len(runs) == 1 else 0.5

    monkeypatch.setattr(search, "time_call", timed)
    monkeypatch.setattr(search.api, "report", lambda _: SimpleNamespace(runs=runs))
    load = Pretended(name="pretended", damage=((0,) * 6,) * 5)
    family = Family((KNOB[0],))
    found = tune(PIPE, EXAMPLES, Budget(min_psnr=28), candidates=[family], workload=load)
    assert found.trials[0].seconds == 0.5


def test_what_is_edited_is_counted_within_its_part():
    told = []
    load = Pretended(name="pretended", damage=((0,) * 6,) * 5)
    family = Family((KNOB[0],))
    budget = Budget(min_psnr=28)
    tune(PIPE, EXAMPLES, budget, candidates=[family], workload=load, on_edit=told.append)
    each = len(EXAMPLES)
    assert told[:each] == [f"plain, {n} of {each}" for n in range(1, each + 1)]
    assert f"search, 1 of {each // 3}: first-block-cache(threshold=0.1)" in told


def test_an_exception_leaves_the_pipeline_plain(pipe, reference):
    def fail(what):
        if what.startswith("search"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(
            pipe,
            EXAMPLES,
            Budget(min_psnr=20),
            candidates=[Family((KNOB[0],), KNOB)],
            workload=LOAD,
            on_edit=fail,
        )
    assert np.array_equal(edit(pipe), reference)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {},
            "has no limit; give at least one of min_psnr, mean_psnr, min_ssim, max_flip, max_",
        ),
        ({"min_psnr": 120}, "min_psnr=120 can never be met; it must lie between 0 and 100"),
        ({"max_lost": -0.1}, "max_lost=-0.1 can never be met"),
        ({"max_flip": "low"}, "max_flip='low' can never be met"),
        ({"min_ssim": float("nan")}, "min_ssim=nan can never be met"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(asked, said):
    with pytest.raises(BenchError, match=said):
        Budget(**asked)


def test_what_cannot_be_tuned_is_refused_before_anything_runs(pipe):
    def never(_):
        raise AssertionError

    budget = Budget(max_lost=0.01)
    with pytest.raises(BenchError, match="there are 1"):
        tune(pipe, EXAMPLES[:1], budget, on_edit=never)
    with pytest.raises(BenchError, match="no program can check"):
        tune(pipe, EXAMPLES, budget, on_edit=never)
    wrong = [Family((Compile(), QKVFusion()))]
    with pytest.raises(PlanError, match="qkv-fusion"):
        tune(pipe, EXAMPLES, Budget(min_psnr=30), candidates=wrong, on_edit=never)
    fluxfire.optimize(pipe, [QKVFusion()])
    with pytest.raises(PlanError, match="plain pipeline"):
        tune(pipe, EXAMPLES, Budget(min_psnr=30), on_edit=never)


def test_prices_decide_in_the_place_of_clocks():
    """Here a hit costs what a step does: so a list that hits is no faster than plain."""
    lists = [Family((FirstBlockCache(schedule=[1]),)), Family((ReferenceCache(schedule=[0]),))]
    pipe, load = tiny_kontext(), replace(LOAD, steps=3)
    dear = Prices(computed=1, reused=1, hit=1, around=1)
    found = tune(pipe, MANY, Budget(min_psnr=1), candidates=lists, workload=load, prices=dear)
    assert found.passes == ()
    assert {trial.speed for trial in found.trials} == {1}
    cheap = Prices(computed=1, reused=0.25, hit=0.5, around=1)
    found = tune(pipe, MANY, Budget(min_psnr=1), candidates=lists, workload=load, prices=cheap)
    assert found.passes == lists[1].passes
    assert found.speed == 4 / (1 + 1 + 2 * 0.25)
    assert {trial.speed for trial in found.trials} == {4 / 3.5, 4 / 2.5}
    assert found.to_dict()["prices"] == asdict(cheap)
    assert "at the prices given" in str(found)
    with pytest.raises(BenchError, match="prices: hit=0; it must be above 0, in seconds"):
        Prices(computed=1, reused=1, hit=0, around=1)


@dataclass(frozen=True)
class Skipping(Pretended):
    """Each index computes a step less; the cache's pictures and fewer steps' have their damage."""

    by_steps: tuple[int, ...] = (0,) * 9  # levels of grey, by number of steps

    def run(self, pipe, example, *, seed=0, steps=None):
        index = index_of(pipe)
        number = MANY.index(example)
        shift = self.by_steps[steps or self.steps] if index is None else self.damage[index][number]
        runs[:] = [run_of(8 - index - 1 if index is not None else steps or self.steps)]
        return Image.new("RGB", (8, 8), (100 + shift,) * 3)


runs = []


def run_of(computed):
    kinds = ["computed"] * computed + ["hit"] * (8 - computed)
    return SimpleNamespace(compiles=0, tokens=None, step_kinds=kinds)


@pytest.fixture
def pretended_runs(monkeypatch):
    """Let reports tell of the pretended runs, whose time is what they compute."""
    monkeypatch.setattr(search.api, "report", lambda _: SimpleNamespace(runs=runs))

    def timed(run):
        picture = run()
        return picture, float(runs[-1].step_kinds.count("computed"))

    monkeypatch.setattr(search, "time_call", timed)


BLOCKS = 5  # of the tiny pipeline: a hit is a fifth of a step


@pytest.mark.parametrize(
    ("fewer", "examples", "index", "said"),
    [
        # Rung 4 computes 3 steps and 5 hits: 4 steps of work.
        ((0, 90, 70, 50, 30, 9, 7, 5, 0), 15, 4, "it beats num_inference_steps=4: "),
        (
            (0, 90, 70, 50, 8, 4, 3, 2, 0),
            15,
            None,
            "num_inference_steps=4 does the same, as far as 5 examples show: ",
        ),
        ((0, 90, 70, 50, 4, 3, 2, 1, 0), 15, None, "num_inference_steps=4 does better: "),
        ((0, 90, 70, 50, 30, 9, 7, 5, 0), 12, None, "4 examples are too few to tell"),
    ],
)
def test_a_lossy_list_must_beat_plain_at_equal_work(pretended_runs, fewer, examples, index, said):
    """Pictures of the cache differ by 6 to 10 levels; those of fewer steps by what a table says."""
    damage = (tuple(6 + i % 5 for i in range(15)),) * 5
    load = Skipping(name="pretended", steps=8, damage=damage, by_steps=fewer)
    families = [Family((KNOB[4],), KNOB[4:])]
    budget = Budget(min_psnr=20)
    found = tune(PIPE, MANY[:examples], budget, candidates=families, workload=load)
    assert found.passes == ((KNOB[index],) if index is not None else ())
    assert said in str(found)
    assert ("is not recommended" in str(found)) == (index is None)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["trials"][-1]["beside_fewer_steps"]["steps"] == 4
    assert conductor_of(PIPE) is None


def test_work_that_rounds_up_to_all_steps_has_a_control_too(pretended_runs):
    """7 steps and a hit are 7.2 of work: 7 plain steps take as long, and do better."""
    by_steps = (0, 90, 90, 90, 90, 90, 90, 1, 0)
    load = Skipping(name="pretended", steps=8, damage=((6,) * 15,) * 5, by_steps=by_steps)
    family = Family((KNOB[0],), KNOB[:1])
    found = tune(PIPE, MANY, Budget(min_psnr=20), candidates=[family], workload=load)
    assert found.passes == ()
    assert "num_inference_steps=7 does better" in str(found)


def test_a_failed_setting_does_not_end_the_search_of_its_family(clock):
    class Failing(Pretended):
        def run(self, pipe, example, **rest):
            if index_of(pipe) == 2:
                raise RuntimeError("out of something")
            return super().run(pipe, example, **rest)

    load = Failing(name="pretended", damage=((0,) * 6,) * 5)
    families = [Family((QKVFusion(),)), Family((KNOB[0],), KNOB)]
    found = tune(PIPE, EXAMPLES, Budget(min_psnr=28), candidates=families, workload=load)
    assert found.passes == (KNOB[1],)


def test_a_more_careful_setting_may_beat_plain_where_a_bold_one_does_not(pretended_runs):
    """Rung 1 computes 6 steps and 2 hits, 6.4 of work: 7 plain steps, which differ by more."""
    damage = tuple((6 + index,) * 15 for index in range(5))
    by_steps = (0, 90, 90, 90, 1, 1, 1, 20, 0)
    load = Skipping(name="pretended", steps=8, damage=damage, by_steps=by_steps)
    family = Family((KNOB[0],), KNOB)
    found = tune(PIPE, MANY, Budget(min_psnr=20), candidates=[family], workload=load)
    assert found.passes == (KNOB[1],)
    assert found.confirmed.comparison.steps == 7
    assert "At equal computed work it beats num_inference_steps=7" in str(found)


def test_fewer_steps_may_be_the_fastest_themselves(pretended_runs, tmp_path):
    damage = ((9,) * 15,) * 5
    by_steps = (0, 60, 15, 12, 10, 3, 2, 1, 0)
    load = Skipping(name="pretended", steps=8, damage=damage, by_steps=by_steps)
    families = [fewer_steps(8), Family((KNOB[0],), KNOB)]
    found = tune(PIPE, MANY, Budget(min_psnr=24), candidates=families, workload=load)
    assert (found.passes, found.steps, found.speed) == ((), 2, 4)
    assert "num_inference_steps=2: within the budget (worst PSNR at least 24 dB)" in str(found)
    assert "steps = 2" in found.to_python()
    assert found.to_dict()["steps"] == 2
    found.save(tmp_path / "tuned.json")
    assert recipes.read(tmp_path / "tuned.json") == ()


def test_fewer_steps_are_every_number_below():
    family = fewer_steps(4, (QKVFusion(),))
    assert [family.steps_at(index) for index in range(len(family))] == [3, 2, 1]
    assert {family.at(index) for index in range(3)} == {(QKVFusion(),)}
    assert Family((QKVFusion(),)).steps_at(0) is None


def test_a_budget_of_the_mean():
    budget = Budget(mean_psnr=30)
    assert str(budget) == "mean PSNR at least 30 dB"
    low, high = (Similarity(psnr, 1.0, 0.0) for psnr in (25.0, 40.0))
    assert budget.violation(low) is None
    assert budget.shortfall(Quality((low, high), (None, None)), None) is None
    assert budget.shortfall(Quality((low, low, high), (None,) * 3), None) is None
    assert budget.shortfall(Quality((low, low), (None,) * 2), None) == "PSNR 25.0 dB on average"


def test_the_usual_candidates_are_dials_from_careful_to_fast():
    for family in cache_families((QKVFusion(), Compile())):
        stages = [p.stage for p in family.passes]
        assert stages in (["weights", *["caching"] * n, "compile"] for n in (1, 2))
        turned = [getattr(p, "threshold", None) or p.spacing for p in family.knob]
        assert turned == sorted(set(turned))
        assert family.at(3)[1] == family.knob[3]


CHEAP = Prices(computed=1, reused=1, hit=0.01, around=0.01)


def test_schedules_of_its_own_examples_are_candidates(counted_time, monkeypatch):
    """The list as Python makes the same list again, whatever its settings are made of."""
    monkeypatch.setattr("fluxfire.bench.tuning.cache_families", lambda *_: [])
    found = tune(PIPE, MANY, Budget(min_psnr=5), workload=LOAD, prices=CHEAP)
    tried = {p for t in found.trials for p in t.passes if isinstance(p, FirstBlockCache)}
    schedules = [p for p in tried if isinstance(p.schedule, tuple)]
    assert schedules
    assert all(p.schedule[0].steps == LOAD.steps for p in schedules)
    written = replace(found, passes=(schedules[0],), steps=None).to_python()
    names = {}
    exec(written, names)
    assert names["passes"] == [schedules[0]]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_where_there_is_nothing_to_skip_the_thresholds_remain(counted_time, steps):
    load = replace(LOAD, steps=steps)
    found = tune(PIPE, MANY[:6], Budget(min_psnr=5), workload=load, prices=CHEAP)
    assert found.trials


def test_a_transformer_that_the_user_compiled_is_tuned_without_schedules(counted_time):
    pipe = tiny_kontext()
    pipe.transformer.compile(backend="eager")
    found = tune(pipe, MANY[:6], Budget(min_psnr=5), workload=LOAD, prices=CHEAP)
    assert found.trials


def test_a_family_of_schedules_goes_from_careful_to_fast():
    recorder = Recorder()
    with fluxfire.optimized(PIPE, [recorder]):
        edit(PIPE, steps=12)
    family = schedule_family(recorder.traces, (QKVFusion(), Compile()), 4)
    assert [p.stage for p in family.passes] == ["weights", "caching", "compile"]
    skipped = [cache.most_hits(12) for cache in family.knob]
    assert skipped == sorted(set(skipped))
    assert skipped[0] == 1
    assert family.at(3)[1] == family.knob[3]


LISTS = [
    presets.faithful,
    presets.article,
    (FirstBlockCache(schedule=[1, 3]), MegaCache(Path("k.megacache"))),
    (FirstBlockCache(schedule=[Schedule(28, {9: 0.3, 11: None}), Schedule(20, {7: 0.2})]),),
    (),
]


@pytest.mark.parametrize(
    "passes", LISTS, ids=["faithful", "article", "schedule", "schedules", "none"]
)
def test_lists_come_back_from_their_files(tmp_path, passes):
    file = tmp_path / "list.json"
    recipes.write(passes, file, note="by hand")
    back = recipes.read(file)
    assert [str(p).replace("PosixPath", "") for p in back] == [
        str(p).replace("PosixPath('k.megacache')", "'k.megacache'") for p in passes
    ]
    assert json.loads(file.read_text())["note"] == "by hand"
    assert [p.name for p in tmp_path.iterdir()] == ["list.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no list of passes"),
        ('{"passes": []}', "has format None"),
        ('{"format": 9, "passes": []}', "has format 9, and this fluxfire reads 1"),
        ('{"format": 1, "passes": [3]}', "pass 1 has no name: 3"),
        ('{"format": 1, "passes": [{"name": "qkv-fusions"}]}', "did you mean 'qkv-fusion'"),
        ('{"format": 1, "passes": [{"name": "compile", "settings": 3}]}', "its settings are 3"),
        (
            (
                '{"format": 1, "passes": [{"name": "first-block-cache", '
                '"settings": {"threshold": -1}}]}'
            ),
            "pass 1, first-block-cache: threshold=-1; it must be 0 or more",
        ),
        (
            '{"format": 1, "passes": [{"name": "compile", "settings": {"speed": 3}}]}',
            "pass 1: compile has no setting 'speed'; there are region, [a-z, _]+$",
        ),
        (
            (
                '{"format": 1, "passes": [{"name": "first-block-cache", '
                '"settings": {"treshold": 0.2}}]}'
            ),
            "no setting 'treshold'; there are threshold, .*; did you mean 'threshold'",
        ),
        (
            '{"format": 1, "passes": [{"name": "inductor-patch", "settings": {"speed": 3}}]}',
            "inductor-patch has no setting 'speed'; it has none",
        ),
    ],
)
def test_files_that_are_no_lists_are_refused(pipe, tmp_path, text, said):
    file = tmp_path / "list.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=said):
        fluxfire.optimize(pipe, file)


def test_what_no_file_could_give_back_is_not_saved(tmp_path):
    with pytest.raises(PlanError, match="not registered as its class|there is no pass"):
        recipes.write([SkipBlock()], tmp_path / "list.json")
    with pytest.raises(PlanError, match="cannot be saved"):
        recipes.write([FirstBlockCache(float("inf"))], tmp_path / "list.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_another_suffix_are_refused(pipe, tmp_path):
    with pytest.raises(PlanError, match=r"^cannot read passes from none\.json: No such [a-z ]+$"):
        fluxfire.optimize(pipe, "none.json")
    with pytest.raises(PlanError, match=r"must end in \.json"):
        recipes.write([], tmp_path / "list.txt")


def test_the_command(counted_time, tmp_path, capsys, monkeypatch):
    """On Spark's own scenes, with a budget that nothing keeps, and one that a single step keeps."""
    monkeypatch.setattr("fluxfire.bench.tuning.exact_families", list)
    bold = FirstBlockCache(1e9, warmup_steps=0, tail_steps=0, max_consecutive_hits=None)
    monkeypatch.setattr("fluxfire.bench.tuning.cache_families", lambda _: [Family((bold,))])
    out = tmp_path / "tuned.json"
    command = ["tune", "-n", "6", "--steps", "4", "--out", str(out)]
    assert main([*command, "--min-psnr", "100"]) == 1
    shown = capsys.readouterr()
    assert "Nothing faster than the plain pipeline" in shown.out
    assert "starting [00:0" in shown.err
    assert "plain, 1 of 6 [0" in shown.err
    assert recipes.read(out) == ()
    assert main([*command, "--overwrite", "--min-psnr", "5", "--max-lost", "1"]) == 0
    shown = capsys.readouterr()
    assert (
        "num_inference_steps=1: within the budget (worst PSNR at least 5 dB, edits right at most "
        "100 points fewer)"
    ) in shown.out
    assert "confirm what you publish on 256 or more" in shown.out
    assert "2 examples are too few to tell" in shown.out  # of the six, two confirm
    assert "call the pipeline with num_inference_steps=1 (--steps 1)" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--min-psnr", "30", "--model", "random-tiny"],
            "random weights, whose pictures are noise",
        ),
        ([], "state a budget, one or more of --min-psnr"),
        (["--min-psnr", "30", "--out", "x.txt"], "must be a file ending in .json"),
        (["--min-psnr", "30", "-n", "2"], "there are 2"),
    ],
)
def test_the_command_refuses(capsys, arguments, said):
    assert main(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err
