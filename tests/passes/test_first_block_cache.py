"""FirstBlockCache: decisions, cached tensors, batches, branches, and undo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxfire
from fluxfire import Change
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.kontext import KONTEXT
from fluxfire.passes import Compile, FirstBlockCache, QKVFusion, Schedule
from fluxfire.passes.first_block_cache import _ResidualHistory
from fluxfire.testing import edit, tiny_kontext

STEPS = 12


UNLIMITED = {"warmup_steps": 0, "tail_steps": 0, "max_consecutive_hits": None}
"""Hits are limited by the threshold alone."""


def cached(**settings):
    return fluxfire.optimize(tiny_kontext(), [FirstBlockCache(**(UNLIMITED | settings))])


def decisions(pipe, branch="cond"):
    return [d for d in fluxfire.report(pipe).runs[-1].decisions if d.branch == branch]


def hits(pipe, branch="cond", sample=0):
    return [d.step for d in decisions(pipe, branch) if d.hits[sample]]


def count_blocks(pipe):
    """Count how often each block really runs."""
    counts = []
    for index, block in enumerate(KONTEXT.blocks(pipe.transformer)):
        counts.append(0)

        def note(*_, index=index):
            counts[index] += 1

        block.attn.register_forward_hook(note)
    return counts


def test_threshold_0_keeps_every_bit(kind):
    plain, pipe = tiny_kontext(kind), tiny_kontext(kind)
    fluxfire.optimize(pipe, [FirstBlockCache(0)])
    assert np.array_equal(edit(pipe, steps=STEPS), edit(plain, steps=STEPS))
    assert hits(pipe) == []
    assert fluxfire.report(pipe).passes[0].exactness == "bitwise"


def test_a_hit_runs_the_first_block_alone():
    pipe = cached(schedule=[2, 3, 7])
    counts = count_blocks(pipe)
    edit(pipe, steps=STEPS)
    assert counts == [12, 9, 9, 9, 9]
    assert hits(pipe) == [2, 3, 7]
    assert fluxfire.report(pipe).runs[-1].hit_rate == 3 / 12


def test_distances_are_those_of_the_first_block(pipe):
    """Compared with distances computed from forward hooks on a plain pipeline."""
    seen = []
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_hook(
        lambda _, __, inputs, out: seen.append(out[1] - inputs["hidden_states"]), with_kwargs=True
    )
    edit(pipe, steps=6)
    for distance, tokens in (("all", 128), ("noise", 64)):
        probe = cached(threshold=0, distance=distance)
        edit(probe, steps=6)
        found = [d.distances for d in decisions(probe)]
        assert found[0] == ()
        for (got,), before, after in zip(found[1:], seen, seen[1:], strict=False):
            one, two = before[:, :tokens].double(), after[:, :tokens].double()
            expected = (two - one).abs().mean() / one.abs().mean()
            assert got == pytest.approx(float(expected), rel=1e-5)


def test_hits_are_the_distances_below_the_threshold_from_the_last_computed_step():
    first = []
    pipe = tiny_kontext()
    block = pipe.transformer.transformer_blocks[0]
    fluxfire.optimize(pipe, [FirstBlockCache(0.33, **UNLIMITED)])
    block.register_forward_hook(
        lambda _, __, inputs, out: first.append(out[1] - inputs["hidden_states"]), with_kwargs=True
    )
    edit(pipe, steps=STEPS)
    last, expected = first[0], []
    for step, added in enumerate(first[1:], start=1):
        if float((added - last).abs().mean() / last.abs().mean()) < 0.33:
            expected.append(step)
        else:
            last = added
    assert 0 < len(expected) < STEPS - 1
    assert hits(pipe) == expected


def test_warm_up_tail_and_cap():
    everything = {"threshold": 1e9, "of_steps": None} | UNLIMITED
    pipe = cached(**everything)
    edit(pipe, steps=8)
    assert hits(pipe) == [1, 2, 3, 4, 5, 6, 7]
    for extra, expected in (
        ({"warmup_steps": 3}, [3, 4, 5, 6, 7]),
        ({"tail_steps": 2}, [1, 2, 3, 4, 5]),
        ({"max_consecutive_hits": 2}, [1, 2, 4, 5, 7]),
        ({"warmup_steps": 8}, []),
        ({"tail_steps": 9}, []),
        ({"schedule": ()}, []),
        ({"schedule": (1, 6, 40)}, [1, 6]),
    ):
        cache = FirstBlockCache(**(everything | extra))
        with fluxfire.using(pipe, cache):
            edit(pipe, steps=8)
        assert hits(pipe) == expected, extra
        assert cache.most_hits(8) == len(expected)


@pytest.mark.parametrize(
    ("warmup", "tail", "steps", "expected"),
    [(8, 2, 28, range(8, 26)), (8, 2, 14, range(4, 13)), (8, 2, 20, range(6, 18)),
     (8, 2, 50, range(15, 46)), (6, 2, 28, range(6, 26)), (0, 0, 28, range(1, 28)),
     (8, 2, 1, range(1, 1)), (28, 0, 28, range(28, 28))],
)  # fmt: skip
def test_warm_up_and_tail_are_shares_of_the_schedule(warmup, tail, steps, expected):
    """8 of 28 steps are 4 of 14, 6 of 20 (5.7 rounded up) and 15 of 50 (14.3 rounded up)."""
    free = {"threshold": 1e9, "max_consecutive_hits": None}
    cache = FirstBlockCache(warmup_steps=warmup, tail_steps=tail, of_steps=28, **free)
    assert list(cache.may_hit(steps)) == list(expected)
    pipe = fluxfire.optimize(tiny_kontext(), [cache])
    edit(pipe, steps=steps)
    assert hits(pipe) == list(expected)


@given(
    st.integers(0, 10), st.integers(0, 5), st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 5), st.integers(1, 60),
)  # fmt: skip
def test_the_most_hits_are_those_of_a_threshold_without_bound(warmup, tail, of, cap, steps):
    """Compared with a step-by-step count."""
    cache = FirstBlockCache(
        1e9, warmup_steps=warmup, tail_steps=tail, of_steps=of, max_consecutive_hits=cap
    )
    scale = 1 if of is None else steps / of
    first, end = (math.ceil(round(n * scale, 9)) for n in (warmup, tail))
    streak = count = 0
    for step in range(steps):
        hit = step > 0 and first <= step < steps - end and (cap is None or streak < cap)
        streak = streak + 1 if hit else 0
        count += hit
    assert cache.most_hits(steps) == count


def test_the_defaults_are_careful():
    """They are no bolder than the settings that others measured on the real model."""
    cache = FirstBlockCache()
    assert (cache.threshold, cache.predict) == (0.12, "damped")
    assert 28 - cache.most_hits(28) == 16
    assert cache.off().most_hits(28) == FirstBlockCache(0).most_hits(28) == 0
    assert FirstBlockCache(schedule=[2, 5, 40]).most_hits(28) == 2


def test_a_schedule_is_for_one_length_and_has_limits():
    """Step 5's limit is below any distance; other lengths follow the threshold."""
    schedule = Schedule(8, {2: 1e9, 3: None, 5: 1e-9})
    pipe = cached(threshold=1e9, schedule=schedule)
    edit(pipe, steps=8)
    assert hits(pipe) == [2, 3]
    measured = [d.step for d in decisions(pipe) if d.distances]
    assert measured == [2, 5]  # a distance waits for the device: only where a limit asks for it
    edit(pipe, steps=6)
    assert hits(pipe) == [1, 2, 3, 4, 5]
    both = FirstBlockCache(schedule=[schedule, Schedule(6, {4: 1e9})])
    with fluxfire.using(pipe, both):
        edit(pipe, steps=6)
        assert hits(pipe) == [4]
        edit(pipe, steps=8)
        assert hits(pipe) == [2, 3]
    assert (both.most_hits(6), both.most_hits(8)) == (1, 3)
    assert both.exactness == "lossy"


def test_a_sample_beyond_its_limit_is_computed_alone():
    """The limit lies between the two samples' distances at the skipped step."""
    pipe = cached(schedule=Schedule(6, {3: 1e9}))
    two = {"prompt": ["red", "a much longer and other prompt"], "steps": 6}
    edit(pipe, **two)
    at = next(d for d in decisions(pipe) if d.step == 3)
    assert at.hits == (True, True)
    limit = sum(at.distances) / 2
    with fluxfire.using(pipe, FirstBlockCache(schedule=Schedule(6, {3: limit}))):
        edit(pipe, **two)
    at = next(d for d in decisions(pipe) if d.step == 3)
    assert at.hits == tuple(d < limit for d in at.distances)
    assert sorted(at.hits) == [False, True]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule(0, {}), "steps=0; it must be a whole number, 1 or more"),
        (lambda: Schedule(8, {0: 0.3}), "has step 0; with steps=8"),
        (lambda: Schedule(8, {8: 0.3}), "from 1 to 7"),
        (lambda: Schedule(8, {2.0: 0.3}), "has step 2.0"),
        (lambda: Schedule(8, {2: 0}), "step 2 has the limit 0; it must be a number above 0"),
        (lambda: Schedule(8, {2: float("inf")}), "or None to skip the step at any distance"),
        (
            lambda: FirstBlockCache(schedule=[Schedule(8, {}), Schedule(8, {1: None})]),
            "two schedules for 8 steps",
        ),
        (lambda: FirstBlockCache(schedule=[Schedule(8, {}), 3]), "schedules alone"),
        (lambda: FirstBlockCache(schedule={"steps": 8}), "each with steps and limits"),
    ],
)
def test_schedules_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match="schedule|step") as caught:
        make()
    assert words in str(caught.value)


def test_equal_schedules_are_equal_however_they_are_written():
    schedule = Schedule(28, {11: 0.25, 9: None})
    assert schedule == Schedule(28, [(9, None), (11, 0.25)])
    for one in (schedule, Schedule(9, {3: 0.25, 5: 0.25}), Schedule(9, {3: None}), Schedule(9, {})):
        assert eval(repr(one), {"Schedule": Schedule}) == one
    as_in_a_file = {"steps": 28, "limits": [[9, None], [11, 0.25]]}
    caches = [FirstBlockCache(schedule=s) for s in (schedule, [schedule], as_in_a_file)]
    assert len(set(caches)) == 1


def extended(points, t, predict):
    """Predict by hand, in float64: the line through the last two points, damped by the third."""
    points = [(s, value.double()) for s, value in points]
    (s0, r0), *older = reversed(points)
    if predict == "hold" or not older:
        return r0.float()
    s1, r1 = older[0]
    share = 1.0
    if predict == "damped" and len(older) > 1:
        s2, r2 = older[1]
        expected = (r1 - r2) * (s0 - s1) / (s1 - s2)
        share = float(((r0 - r1) * expected).sum() / (expected * expected).sum())
        share = min(max(share, 0.0), 1.0)
    return (r0 + share * (t - s0) / (s0 - s1) * (r0 - r1)).float()


@pytest.mark.parametrize("came", [-0.4, 0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damping(came, dtype):
    """Each sample's slope keeps the share of the predicted change that came, from 0 to 1."""
    values = torch.Generator().manual_seed(0)
    oldest, change, aside = (torch.randn(3, 40, 8, generator=values) for _ in range(3))
    middle = oldest + 0.1 * change
    # From 0.9 over 0.8 to 0.6 the line predicts twice the change; beside it comes something else.
    newest = middle + 0.2 * came * change
    along = (aside * change).sum((1, 2)) / change.square().sum((1, 2))
    newest += 0.01 * (aside - along[:, None, None] * change)
    history = _ResidualHistory([], [], [])
    for residual, sigma in ((oldest, 0.9), (middle, 0.8), (newest, 0.6)):
        at = torch.full((3,), sigma)
        if not history.residuals:
            history = _ResidualHistory([residual.to(dtype)], [at], [1] * 3)
        else:
            # The last sample hit at the middle step, so it has two residuals in the end.
            hits = [False, False, sigma == 0.8]
            history.add(residual.to(dtype), at, hits, keep=3)
    made = history.predict(torch.full((3,), 0.5)).double()
    share = min(max(came, 0.0), 1.0)
    expected = newest + 0.5 * share * (newest - middle)
    close = 1e-5 if dtype is torch.float32 else 0.05
    assert (made[:2] - expected[:2]).abs().max() < close
    alone = newest[2] + (newest[2] - oldest[2]) / 3
    assert (made[2] - alone).abs().max() < close


def test_damping_of_a_residual_that_does_not_change():
    same = torch.randn(1, 4, 8)
    history = _ResidualHistory([same] * 3, [torch.tensor([s]) for s in (0.6, 0.8, 0.9)], [3])
    assert torch.equal(history.predict(torch.tensor([0.5])), same)


@pytest.mark.parametrize("steps", [(3,), (2, 4, 5), (5,)])
@pytest.mark.parametrize("predict", ["hold", "linear", "damped"])
def test_what_a_hit_adds(steps, predict):
    """Compared with blocks that are run by hand, on a plain transformer without wrappers."""
    pipe = cached(schedule=steps, predict=predict)
    made = edit(pipe, steps=7)
    plain = tiny_kontext()
    blocks = KONTEXT.blocks(plain.transformer)
    original = [block.forward for block in blocks]
    state = {"step": -1, "points": []}

    def first(hidden_states, encoder_hidden_states, temb, **rest):
        state["step"] += 1
        out = original[0](hidden_states, encoder_hidden_states, temb=temb, **rest)
        state["start"] = out[1]
        return out

    def skipping(index):
        def forward(hidden_states, encoder_hidden_states, **rest):
            if state["step"] in steps:
                if index < len(blocks) - 1:
                    return encoder_hidden_states, hidden_states
                rest = extended(state["points"], plain.current_timestep / 1000, predict)
                return encoder_hidden_states, state["start"] + rest
            out = original[index](hidden_states, encoder_hidden_states, **rest)
            if index == len(blocks) - 1:
                state["points"].append((plain.current_timestep / 1000, out[1] - state["start"]))
            return out

        return forward

    blocks[0].forward = first
    for index in range(1, len(blocks)):
        blocks[index].forward = skipping(index)
    assert np.abs(made - edit(plain, steps=7)).max() < 1e-5


def test_lines_are_drawn_through_exact_noise_levels():
    """bfloat16 rounds the timesteps that the transformer gets, but not the sigmas of the line."""
    pipe = tiny_kontext(dtype=torch.bfloat16)
    seen = []

    class Levels(FirstBlockCache):
        name = "levels"

        def apply(self, tx):
            def note(run, streams, blocks, call):
                seen.append((float(call.sigma), float(call.timestep[0])))
                return run(streams, blocks)

            tx.wrap_blocks(note)
            return Change(0, "things")

    fluxfire.optimize(pipe, [Levels()])
    edit(pipe, steps=40)
    exact = (pipe.scheduler.timesteps / 1000).tolist()
    assert [level for level, _ in seen] == pytest.approx(exact)
    assert max(abs(rounded - level) for level, rounded in seen) > 1e-3


def test_the_branches_of_true_cfg_do_not_mix():
    cfg = {"negative_prompt": "dull colours", "true_cfg_scale": 2.0, "steps": STEPS}
    pipe = cached(threshold=0.33)
    edit(pipe, **cfg)
    alone = cached(threshold=1e9)
    edit(alone, **cfg)
    for branch in ("cond", "uncond"):
        assert decisions(pipe, branch)[0].distances == ()
        assert 0 < len(hits(pipe, branch)) < STEPS - 1
        assert hits(alone, branch) == list(range(1, STEPS))
    assert np.array_equal(edit(cached(threshold=0), **cfg), edit(tiny_kontext(), **cfg))


def batch(n):
    """Return prompts and noise that differ so much that samples decide differently."""
    words = ["make it night", "x", "a very long instruction, with many words in it", "?!"]
    return words[:n], [torch.Generator().manual_seed(10 + i) for i in range(n)]


@pytest.mark.parametrize("predict", ["hold", "linear", "damped"])
def test_every_sample_of_a_batch_decides_for_itself(predict):
    settings = {"threshold": 0.31, "predict": predict}
    prompts, generators = batch(4)
    together = cached(**settings)
    made = edit(together, prompt=prompts, generator=generators, steps=STEPS)
    plain = edit(tiny_kontext(), prompt=prompts, generator=batch(4)[1], steps=STEPS)
    patterns = set()
    for sample in range(4):
        alone = cached(**settings)
        solo = edit(alone, prompt=prompts[sample], generator=batch(4)[1][sample], steps=STEPS)
        assert hits(together, sample=sample) == hits(alone)
        own = edit(
            tiny_kontext(), prompt=prompts[sample], generator=batch(4)[1][sample], steps=STEPS
        )
        noise_floor = max(1e-5, np.abs(plain[sample] - own[0]).max())
        assert np.abs(made[sample] - solo[0]).max() <= 3 * noise_floor
        patterns.add(tuple(hits(alone)))
    assert len(patterns) > 1, "all samples decided alike: nothing was tested"


def test_nothing_is_kept_after_a_generation_that_raised():
    pipe = cached(threshold=1e9)
    expected = edit(pipe)

    def fail(*_):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        edit(pipe, callback_on_step_end=fail)
    assert np.array_equal(edit(pipe), expected)
    larger = edit(pipe, (48, 32))
    assert larger.shape == (1, 32, 48, 3)
    assert np.array_equal(edit(pipe), expected)
    assert hits(pipe) == [1, 2]


def test_using_changes_settings_for_a_while_and_refuses_the_rest():
    pipe = fluxfire.optimize(tiny_kontext(), [QKVFusion(), FirstBlockCache(0)])
    plain = edit(pipe, steps=6)
    free = UNLIMITED | {"of_steps": None}
    with fluxfire.using(pipe, [FirstBlockCache(1e9, **(free | {"tail_steps": 1}))]) as same:
        assert same is pipe
        edit(pipe, steps=6)
        assert hits(pipe) == [1, 2, 3, 4]
        with fluxfire.using(pipe, FirstBlockCache(schedule=[5])):
            edit(pipe, steps=6)
            assert hits(pipe) == [5]
        edit(pipe, steps=6)
        assert hits(pipe) == [1, 2, 3, 4]
    assert np.array_equal(edit(pipe, steps=6), plain)
    with pytest.raises(RuntimeError, match="inside"), fluxfire.using(pipe, FirstBlockCache(1e9)):
        raise RuntimeError("inside")
    assert np.array_equal(edit(pipe, steps=6), plain)
    for wanted, words in (
        ([Compile()], "compile is not applied; using() changes settings only"),
        (QKVFusion(vae=False), "qkv-fusion has no settings that can change at run time"),
        ("quick", "there is no preset 'quick'"),
    ):
        with pytest.raises(PlanError) as caught, fluxfire.using(pipe, wanted):
            pass
        assert words in str(caught.value)
    with (
        pytest.raises(PlanError, match="needs an optimized pipeline"),
        fluxfire.using(tiny_kontext(), FirstBlockCache()),
    ):
        pass


def test_what_is_refused(pipe):
    twice = fluxfire.plan(pipe, [FirstBlockCache(), FirstBlockCache(0.2)])
    assert "in the list twice" in twice.complaints()[0]
    fluxfire.optimize(pipe, [FirstBlockCache(0.1)])
    again = fluxfire.plan(pipe, [FirstBlockCache(0.2)])
    assert "already applied, as FirstBlockCache(threshold=0.1)" in again.complaints()[0]
    whole = fluxfire.plan(tiny_kontext(), [FirstBlockCache(), Compile("transformer")])
    assert "decides between the blocks" in whole.complaints()[0]

    from diffusers import FirstBlockCacheConfig

    native = tiny_kontext()
    native.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    said = fluxfire.plan(native, [FirstBlockCache()]).complaints()
    assert "diffusers' own cache is enabled" in said[0]
    marked = tiny_kontext()
    marked.transformer._is_cached = True
    said = fluxfire.plan(marked, [FirstBlockCache()]).complaints()
    assert "another library's cache" in said[0]


def test_another_cache_put_on_afterwards_is_refused_by_name(reference):
    from diffusers import FirstBlockCacheConfig

    pipe = fluxfire.optimize(tiny_kontext(), [FirstBlockCache(0)])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(FluxfireError, match="diffusers' own cache is enabled .* since optimize()"):
        edit(pipe)
    pipe.transformer.disable_cache()
    assert np.array_equal(edit(pipe), reference)


def test_group_offloading_is_refused(pipe):
    try:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    except AttributeError:
        pytest.skip("this diffusers offloads groups only where there is an accelerator")
    said = fluxfire.plan(pipe, [FirstBlockCache()]).complaints()
    assert "group offloading prefetches blocks" in said[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": -0.1}, "threshold=-0.1; it must be 0 or more"),
        ({"threshold": float("nan")}, "threshold=nan; it must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps=-1; it must be a whole number, 0 or more"),
        ({"warmup_steps": 0.3}, "warmup_steps=0.3; it must be a whole number, 0 or more"),
        ({"tail_steps": -2}, "tail_steps=-2; it must be a whole number, 0 or more"),
        ({"tail_steps": None}, "tail_steps=None; it must be a whole number, 0 or more"),
        ({"max_consecutive_hits": 0}, "it must be a whole number, 1 or more, or None for no limit"),
        ({"max_consecutive_hits": 2.0}, "max_consecutive_hits=2.0; it must be a whole number"),
        ({"of_steps": 0}, "of_steps=0; it must be a whole number, 1 or more, or None for plain"),
        ({"of_steps": 0.5}, "of_steps=0.5; it must be a whole number"),
        ({"schedule": [3, 0]}, "step 0 cannot hit"),
        ({"distance": "text"}, "distance='text'; it must be one of all, noise"),
        ({"predict": "guess"}, "predict='guess'; it must be one of hold, linear, damped"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match="must be|cannot hit") as caught:
        FirstBlockCache(**settings)
    assert words in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(
    schedule=st.sets(st.integers(1, 5)),
    predict=st.sampled_from(["hold", "linear", "damped"]),
    seed=st.integers(0, 3),
)
def test_restore_gives_every_bit_back(schedule, predict, seed):
    pipe = tiny_kontext(seed=seed)
    plain = edit(pipe, steps=6)
    fluxfire.optimize(pipe, [FirstBlockCache(schedule=schedule, predict=predict)])
    edit(pipe, steps=6)
    assert hits(pipe) == sorted(schedule)
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe, steps=6), plain)


@pytest.mark.slow
def test_hits_and_misses_share_graphs_under_regional_compilation():
    compiled = fluxfire.optimize(tiny_kontext(), [Compile(fullgraph=True)])
    edit(compiled, steps=6)
    graphs = fluxfire.report(compiled).runs[-1].compiles
    torch.compiler.reset()
    expected = edit(cached(schedule=[1, 3, 4]), steps=6)
    pipe = fluxfire.optimize(
        tiny_kontext(), [FirstBlockCache(schedule=[1, 3, 4]), Compile(fullgraph=True)]
    )
    assert np.abs(edit(pipe, steps=6) - expected).max() < 1e-4
    run = fluxfire.report(pipe).runs[-1]
    assert run.graph_breaks == 0
    assert run.compiles == graphs
    for other in (FirstBlockCache(1e9), FirstBlockCache(0), FirstBlockCache(predict="linear")):
        with fluxfire.using(pipe, other):
            edit(pipe, steps=6)
            assert fluxfire.report(pipe).runs[-1].compiles == 0
