"""The quality that a request can have, and that it is what the preset of its name gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxfire
from fluxfire import presets, spark
from fluxfire.bench import held_out
from fluxfire.passes import Compile, EncodingCache, FirstBlockCache, Float8, ReferenceCache
from fluxfire.serve.pipeline_editor import PipelineEditor
from fluxfire.serve.quality_levels import (
    current_level,
    default_passes,
    describe_level,
    settings_by_level,
)
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import AS_APPLIED, LEVELS, STEPS, PipelineRequest, RawPicture
from fluxfire.serve.worker import _load_editor

LOOSE = FirstBlockCache(0.9, predict="hold")
PAGE = Path(__file__).parent.parent / "docs" / "pages" / "how-to" / "serve.md"


def cache_of(level):
    return next(p for p in presets.named(level) if isinstance(p, FirstBlockCache))


def test_presets_offer_what_they_can():
    assert list(settings_by_level(presets.faithful)) == ["faithful"]
    for name in ("balanced", "fast"):
        assert tuple(settings_by_level(presets.named(name))) == LEVELS
        assert current_level(presets.named(name)) == name
    assert current_level(presets.faithful) == "faithful"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_by_default_nothing_is_lossy_and_requests_can_ask_for_it(device):
    passes = default_passes(device)
    assert current_level(passes) == "faithful"
    assert {p.exactness for p in passes}.isdisjoint({"lossy"})
    assert tuple(settings_by_level(passes)) == LEVELS
    assert settings_by_level(passes)["balanced"] == (cache_of("balanced"),)


def test_the_default_is_faithful_and_a_cache():
    *_, cache, compiled = default_passes("cuda")
    assert (*default_passes("cuda")[:-2], compiled) == presets.faithful
    assert default_passes("cpu") == (cache,) == (cache_of("balanced").off(),)


@pytest.mark.parametrize(
    "applied", [default_passes("cuda"), (LOOSE, ReferenceCache(0.3)), presets.faithful]
)
@pytest.mark.parametrize("steps", [8, STEPS, 50])
def test_a_level_says_what_it_does(applied, steps):
    for level, settings in settings_by_level(applied).items():
        if level == "faithful":
            assert describe_level(settings, steps) == "computes every step"
        else:
            most = cache_of(level).most_hits(steps)
            assert describe_level(settings, steps) == f"lossy: skips up to {most} of {steps} steps"
        lossy = "lossy" in {p.exactness for p in settings}
        assert describe_level(settings, steps).startswith("lossy") == lossy


def test_the_page_says_what_the_levels_say():
    said = [
        f"# {name}: {describe_level(of)}"
        for name, of in settings_by_level(default_passes("cuda")).items()
    ]
    assert "\n".join(said) in PAGE.read_text()


def test_what_is_lossy_otherwise_rules_all_out():
    assert settings_by_level([Float8(), *presets.balanced]) == {}
    assert current_level([Float8(), Compile()]) == AS_APPLIED
    assert current_level([LOOSE]) == AS_APPLIED


def test_a_cache_that_a_level_does_not_have_is_off():
    levels = settings_by_level([EncodingCache(), LOOSE, ReferenceCache(0.3)])
    assert list(levels) == list(LEVELS)
    first, second = levels["fast"]
    assert first == presets.fast[-2]
    assert second.exactness == "bitwise"
    assert {p.exactness for p in levels["faithful"]} == {"bitwise"}
    assert list(settings_by_level([ReferenceCache(0.3)])) == ["faithful"]


@pytest.fixture(scope="module")
def editor():
    pipe = spark.load()
    passes = (LOOSE, ReferenceCache(0.2))
    fluxfire.optimize(pipe, passes)
    return PipelineEditor(pipe, passes, "spark")


EXAMPLES = held_out(6)


def ask(number, **more):
    example = EXAMPLES[number]
    settings = {"picture": RawPicture.of(example.picture), "seeds": (number,), "steps": 12}
    return PipelineRequest(prompt=example.instruction, **(settings | more))


def pixels(result, picture=0):
    return np.asarray(result.pictures[picture].picture(), dtype=np.int16)


def edit(editor, *asks, at_once=8):
    steps = []
    made = editor.edit(dict(enumerate(asks)), at_once, lambda *told: steps.append(told))
    assert steps == [(i + 1, steps[-1][1]) for i in range(len(steps))]
    assert steps[-1][0] == steps[-1][1]
    return list(made.values())


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_its_preset(editor, level):
    """Bit for bit, with the pipeline called as a user would."""
    example = EXAMPLES[0]
    pipe = spark.load()
    fluxfire.optimize(pipe, [] if level == "faithful" else [cache_of(level)])
    picture = pipe(
        image=example.picture,
        prompt=example.instruction,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    (result,) = edit(editor, ask(0, level=level))
    assert np.array_equal(pixels(result), np.asarray(picture))
    kinds = fluxfire.report(pipe).runs[-1].step_kinds
    assert list(result.steps) == kinds
    assert result.hit_rate == pytest.approx(kinds.count("hit") / 12)
    assert ("hit" in kinds) == (level != "faithful")


def test_a_request_that_names_no_quality_gets_every_step_computed():
    pipe = spark.load()
    passes = default_passes(pipe.device.type)
    fluxfire.optimize(pipe, passes)
    editor = PipelineEditor(pipe, passes, "spark")
    assert editor.facts.level == "faithful"
    assert editor.facts.levels["faithful"] == "computes every step"
    assert list(editor.facts.levels) == list(LEVELS)
    (usually,) = edit(editor, ask(0))
    assert set(usually.steps) == {"computed"}
    (skipping,) = edit(editor, ask(0, level="balanced"))
    assert 0 < skipping.steps.count("hit") <= cache_of("balanced").most_hits(12)
    (again,) = edit(editor, ask(0))
    assert again == usually


def test_a_batch_gives_what_each_gives_alone(editor):
    """Also where its samples hit at different steps; and so do several pictures of one request."""
    for level in ("faithful", "fast"):
        asks = [ask(n, level=level) for n in range(3)]
        together = edit(editor, *asks)
        for wanted, result in zip(asks, together, strict=True):
            (alone,) = edit(editor, wanted)
            assert np.abs(pixels(result) - pixels(alone)).max() <= 2
            assert result.steps == alone.steps
    (both,) = edit(editor, ask(1, seeds=(7, 8), level="faithful"))
    for i, seed in enumerate((7, 8)):
        (alone,) = edit(editor, ask(1, seeds=(seed,), level="faithful"))
        assert np.abs(pixels(both, i) - pixels(alone)).max() <= 2


def test_more_than_fit_are_made_in_turn(editor):
    (several,) = edit(editor, ask(2, seeds=(1, 2, 3), steps=2), at_once=2)
    (alone,) = edit(editor, ask(2, seeds=(3,), steps=2))
    assert len(several.pictures) == 3
    assert np.abs(pixels(several, 2) - pixels(alone)).max() <= 2


def test_true_cfg_and_other_words(editor):
    plain, guided, other = (
        edit(editor, ask(3, level="faithful", steps=3))
        + edit(
            editor, ask(3, level="faithful", steps=3, negative_prompt="a boat", true_cfg_scale=4.0)
        )
        + edit(editor, ask(3, level="faithful", steps=3, prompt_2="make the circle blue"))
    )
    assert not np.array_equal(pixels(plain), pixels(guided))
    assert not np.array_equal(pixels(plain), pixels(other))
    assert len(guided.steps) == 3


def test_kinds():
    """What may be made at once, and what may not."""
    assert ask(0).kind == ask(0, seeds=(5, 6), prompt_2="more").kind
    different = [
        ask(0),
        ask(0, steps=3),
        ask(0, level="fast"),
        ask(0, size=(256, 256)),
        ask(0, guidance_scale=1.0),
        ask(0, picture=None),
        ask(0, negative_prompt="no", true_cfg_scale=2.0),
        ask(0, negative_prompt="no", true_cfg_scale=3.0),
    ]
    assert len({a.kind for a in different}) == len(different)
    assert ask(0, true_cfg_scale=2.0).kind == ask(0).kind  # nothing to steer away from


def test_sizes(editor):
    (landscape,) = edit(editor, ask(0, size=(1024, 512), steps=1))
    made = landscape.pictures[0]
    assert (made.width, made.height) == spark.load().reference_size(1024, 512)
    (from_text,) = edit(editor, ask(0, picture=None, size=(512, 512), steps=1))
    assert (from_text.pictures[0].width, from_text.pictures[0].height) == (128, 128)


def test_what_is_raised_in_a_step_ends_the_run_and_leaves_nothing(editor):
    class GoneError(Exception):
        pass

    def gone(step, steps):
        raise GoneError

    with pytest.raises(GoneError):
        editor.edit({1: ask(0)}, 1, gone)
    (after,) = edit(editor, ask(0, level="faithful", steps=2))
    (again,) = edit(editor, ask(0, level="faithful", steps=2))
    assert np.array_equal(pixels(after), pixels(again))


def test_words_that_clip_cuts_are_told_and_not_logged(caplog):
    pipe = spark.load(device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    passes = ()
    fluxfire.optimize(pipe, passes)
    editor = PipelineEditor(pipe, passes, "spark")
    words = "make the background purple " * 30
    long, short = (
        PipelineRequest(prompt=text, steps=1, true_cfg_scale=2.0, negative_prompt=negative)
        for text, negative in ((words, words), ("make the background purple", "red"))
    )
    made = editor.edit({1: long, 2: short}, 2, lambda *_: None)
    assert made[2].warnings == ()
    first, second = made[1].warnings
    most = pipe.tokenizer_max_length
    n = len(pipe.tokenizer(words).input_ids)
    assert f"the prompt has {n} tokens, and CLIP reads the first {most} of them" in first
    assert second.startswith("the negative_prompt has")
    assert "purple" not in first + second + caplog.text


def test_a_placed_pipeline_keeps_its_levels():
    """What places it changes no step."""
    placed = _load_editor(Settings(model="spark", memory="auto", warm_up=((64, 64),), max_batch=1))
    assert placed.facts.passes[0] == "Placement()"
    assert [*placed.facts.levels] == ["faithful", "balanced", "fast"]
    assert placed.facts.level == "faithful"
