"""ReferenceCache: refresh steps, the steps between them, and undo."""

from __future__ import annotations

import gc
import inspect
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxfire
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.kontext import KONTEXT
from fluxfire.kontext.attention import ReferenceAttnProcessor, ReferenceKV
from fluxfire.passes import (
    Attention,
    Compile,
    FirstBlockCache,
    FusedBlocks,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.runtime.conductor import TransformerCall
from fluxfire.testing import edit, tiny_kontext
from passes.test_compile import with_ip_adapter
from passes.test_first_block_cache import batch, count_blocks
from passes.test_first_block_cache import hits as hits_of
from passes.test_qkv_fusion import with_lora
from thinned import exhaustive, half

CLOSE = 1e-5
TOKENS = 64  # noise tokens, and as many reference tokens
CFG = {"negative_prompt": "dull colours", "true_cfg_scale": 2.0}
TWO = {"num_images_per_prompt": 2}
EVERY = ReferenceCache(schedule=range(99))
NEVER = 9.0  # more than the sigma can fall


def cached(*args, **settings):
    return fluxfire.optimize(tiny_kontext(), [ReferenceCache(*args, **settings)])


def refreshes(pipe, branch="cond"):
    return [r for r in fluxfire.report(pipe).runs[-1].refreshes if r.branch == branch]


def refreshed(pipe, branch="cond", sample=0):
    return [r.step for r in refreshes(pipe, branch) if r.due[sample]]


class ByHand:
    """diffusers' attention with a reference KV cache written by hand."""

    def __init__(self, state):
        self.state, self.kept = state, {}

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, mask=None, image_rotary_emb=None
    ):
        text, image = encoder_hidden_states, hidden_states
        query, key, value = (
            layer(image).unflatten(-1, (attn.heads, -1))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if text is not None:
            more = [
                layer(text).unflatten(-1, (attn.heads, -1))
                for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            query = torch.cat([attn.norm_added_q(more[0]), query], 1)
            key = torch.cat([attn.norm_added_k(more[1]), key], 1)
            value = torch.cat([more[2], value], 1)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        kept = self.kept.setdefault(self.state["branch"], [])
        if self.state["due"]:
            kept.append((self.state["sigma"], key[:, -TOKENS:], value[:, -TOKENS:]))
        else:
            key, value = (
                torch.cat([key, self.old(kept, 1)], 1),
                torch.cat([value, self.old(kept, 2)], 1),
            )
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        out = out.transpose(1, 2).flatten(2)
        if text is None:
            return out
        words = text.shape[1]
        return attn.to_out[0](out[:, words:]), attn.to_add_out(out[:, :words])

    def old(self, kept, which):
        last = kept[-1]
        if self.state["predict"] == "hold" or len(kept) == 1:
            return last[which]
        before = kept[-2]
        slope = (last[which] - before[which]) / (last[0] - before[0])
        return last[which] + (self.state["sigma"] - last[0]) * slope


def by_hand(pipe, due, branches=1, *, predict="hold"):
    """Make a plain pipeline compute the reference at the refresh steps only."""
    state = {"calls": 0, "predict": predict}
    blocks = KONTEXT.blocks(pipe.transformer)

    def begin(_, args, kwargs):
        state["sigma"] = float(kwargs["timestep"][0])
        step, state["branch"] = divmod(state["calls"], branches)
        state["due"] = step in due
        state["calls"] += 1

    def cut(_, args, kwargs):
        if state["due"]:
            return None
        end = kwargs["encoder_hidden_states"].shape[1] + TOKENS
        return args, {
            **kwargs,
            "hidden_states": kwargs["hidden_states"][:, :TOKENS],
            "image_rotary_emb": tuple(x[:end] for x in kwargs["image_rotary_emb"]),
        }

    pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True)
    for block in blocks:
        block.attn.processor = ByHand(state)
        block.register_forward_pre_hook(cut, with_kwargs=True)
    return pipe


@pytest.mark.parametrize("pass_", [ReferenceCache(0), EVERY], ids=["spacing 0", "every step"])
@pytest.mark.parametrize("call", [{}, TWO, CFG], ids=["one", "batch", "true CFG"])
def test_where_every_step_is_a_refresh_every_bit_is_kept(kind, pass_, call):
    plain = edit(tiny_kontext(kind), **call)
    assert np.array_equal(edit(fluxfire.optimize(tiny_kontext(kind), [pass_]), **call), plain)


@pytest.mark.parametrize(
    "others",
    [
        [],
        [QKVFusion()],
        [FusedBlocks()],
        [Attention("_native_math")],
        [QKVFusion(), FusedBlocks(), ModulationTable()],
    ],
    ids=lambda of: "+".join(p.name for p in of) or "alone",
)
@pytest.mark.parametrize("call", [{}, TWO, CFG], ids=["one", "batch", "true CFG"])
def test_what_steps_between_refreshes_compute(others, call):
    due = [0, 2]
    expected = edit(by_hand(tiny_kontext(), due, 2 if call == CFG else 1), steps=5, **call)
    pipe = fluxfire.optimize(tiny_kontext(), [*others, ReferenceCache(schedule=due)])
    made = edit(pipe, steps=5, **call)
    assert refreshed(pipe) == due
    assert np.abs(made - expected).max() < CLOSE
    assert np.abs(made - edit(tiny_kontext(), steps=5, **call)).max() > 1e-4


@pytest.mark.parametrize(
    "others", [[], [FusedBlocks()]], ids=lambda of: "+".join(p.name for p in of) or "alone"
)
@pytest.mark.parametrize("call", [{}, TWO, CFG], ids=["one", "batch", "true CFG"])
def test_what_steps_after_two_refreshes_predict(others, call):
    due = [0, 2, 5]
    branches = 2 if call == CFG else 1
    expected = edit(by_hand(tiny_kontext(), due, branches, predict="linear"), steps=8, **call)
    held = edit(by_hand(tiny_kontext(), due, branches), steps=8, **call)
    pipe = fluxfire.optimize(
        tiny_kontext(), [*others, ReferenceCache(schedule=due, predict="linear")]
    )
    made = edit(pipe, steps=8, **call)
    assert refreshed(pipe) == due
    assert np.abs(made - expected).max() < CLOSE
    assert np.abs(held - expected).max() > 10 * CLOSE


@pytest.mark.parametrize("in_float8", [False, True])
def test_a_prediction_keeps_twice_as_much(in_float8):
    kept = []
    for predict in ("hold", "linear"):
        pipe = cached(schedule=[0, 2], predict=predict, in_float8=in_float8)
        edit(pipe, steps=4)
        kept.append(fluxfire.report(pipe).passes[-1].facts["kept_bytes"])
    assert kept[1] == 2 * kept[0]


@pytest.mark.parametrize("others", [[], [Attention("fa3-fp8")]], ids=["float32", "fp8 attention"])
def test_a_prediction_from_float8_is_near_the_oracles(others):
    due = [0, 2, 5]
    expected = edit(by_hand(tiny_kontext(), due, predict="linear"), steps=8)
    settings = {"schedule": due, "in_float8": not others}
    made = {
        predict: edit(
            fluxfire.optimize(
                tiny_kontext(), [*others, ReferenceCache(predict=predict, **settings)]
            ),
            steps=8,
        )
        for predict in ("hold", "linear")
    }
    rounded = fluxfire.optimize(tiny_kontext(), [*others, EVERY]) if others else tiny_kontext()
    rounding = np.abs(edit(rounded, steps=8) - edit(tiny_kontext(), steps=8)).mean()
    assert np.abs(made["linear"] - expected).mean() < 3e-3 + 2 * rounding
    assert not np.array_equal(made["linear"], made["hold"])


def test_inpainting_with_a_reference():
    expected = edit(by_hand(tiny_kontext("inpaint"), [0]), steps=4)
    pipe = fluxfire.optimize(tiny_kontext("inpaint"), [ReferenceCache(NEVER)])
    assert np.abs(edit(pipe, steps=4) - expected).max() < CLOSE
    assert refreshed(pipe) == [0]


@pytest.mark.parametrize("call", [{}, TWO], ids=["one", "batch"])
def test_a_reference_is_kept_in_float8_too(call):
    """With only refreshes the picture is float8's own; else it is near the oracle's."""
    float8 = edit(fluxfire.optimize(tiny_kontext(), [Attention("fa3-fp8")]), steps=4, **call)
    pipe = fluxfire.optimize(tiny_kontext(), [Attention("fa3-fp8"), EVERY])
    assert np.array_equal(edit(pipe, steps=4, **call), float8)
    whole = fluxfire.report(pipe).passes[-1].facts["kept_bytes"]
    with fluxfire.using(pipe, ReferenceCache(NEVER)):
        made = edit(pipe, steps=4, **call)
    assert refreshed(pipe) == [0]
    expected = edit(by_hand(tiny_kontext(), [0]), steps=4, **call)
    rounding = np.abs(float8 - edit(tiny_kontext(), steps=4, **call)).mean()
    assert np.abs(made - expected).mean() < 2 * rounding
    plain = cached()
    edit(plain, **call)
    assert fluxfire.report(plain).passes[-1].facts["kept_bytes"] == 4 * whole


@pytest.fixture(scope="module")
def shared():
    pipe = cached()
    return lambda: pipe  # hypothesis prints arguments


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 9),
    spacing=st.floats(0.01, 1.1),
    ends=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    schedule=st.none() | st.sets(st.integers(1, 9)),
)
def test_steps_refresh_by_noise_level_or_schedule(shared, steps, spacing, ends, schedule):
    pipe, (warmup, tail) = shared(), ends
    wanted = None if schedule is None else {0, *schedule}
    by = ReferenceCache(spacing, warmup_steps=warmup, tail_steps=tail, schedule=wanted)
    with fluxfire.using(pipe, by):
        edit(pipe, steps=steps, output_type="latent")
    levels = (pipe.scheduler.timesteps / 1000).tolist()
    expected = [0]
    for step in range(1, steps):
        planned = levels[expected[-1]] - levels[step] > spacing - 1e-5
        planned |= step < warmup or step >= steps - tail
        if step in wanted if wanted is not None else planned:
            expected.append(step)
    assert refreshed(pipe) == expected


def test_drift_is_what_changed_of_what_the_first_block_adds_to_the_reference():
    """Compared with a plain pipeline's hooks; up to the second refresh both compute the same."""
    pipe = cached(NEVER, drift=1e9)
    seen = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(
        lambda _, __, kwargs, out: seen.append((out[1] - kwargs["hidden_states"])[:, TOKENS:]),
        with_kwargs=True,
    )
    counts = count_blocks(pipe)
    edit(pipe, steps=6)
    assert refreshed(pipe) == [0]
    assert counts == [6] * 5
    assert {len(added[0]) for added in seen} == {TOKENS}, "the first block runs in full"
    drifts = [r.drifts for r in refreshes(pipe)]
    assert drifts[0] == ()
    expected = [float((x - seen[0]).abs().mean() / seen[0].abs().mean()) for x in seen[1:]]
    assert [of for (of,) in drifts[1:]] == pytest.approx(expected, rel=1e-5)
    limit = expected[2] - 1e-4
    with fluxfire.using(pipe, ReferenceCache(NEVER, drift=limit)):
        edit(pipe, steps=6)
    first = next(step for step, drift in enumerate(expected, start=1) if drift > limit)
    assert refreshed(pipe)[:2] == [0, first]


@pytest.mark.parametrize("predict", ["hold", "linear"])
@pytest.mark.parametrize("others", [[], [FusedBlocks()], [Attention("fa3-fp8")]], ids=str)
def test_every_sample_of_a_batch_is_what_it_is_alone(others, predict):
    """The drifts differ, so that samples refresh at different steps."""
    passes = [*others, ReferenceCache(NEVER, drift=0.31, predict=predict)]
    call, tolerance = partial(edit, steps=10), 5e-2 if Attention("fa3-fp8") in others else CLOSE
    together = fluxfire.optimize(tiny_kontext(), passes)
    prompts, generators = batch(4)
    made = call(together, prompt=prompts, generator=generators)
    patterns = set()
    for sample, (prompt, generator) in enumerate(zip(prompts, batch(4)[1], strict=True)):
        alone = fluxfire.optimize(tiny_kontext(), passes)
        solo = call(alone, prompt=prompt, generator=generator)
        assert refreshed(together, sample=sample) == refreshed(alone)
        assert np.abs(made[sample] - solo[0]).max() < tolerance
        patterns.add(tuple(refreshed(alone)))
    assert len(patterns) > 1, "all samples refreshed alike: nothing was tested"
    mixed = [r for r in refreshes(together) if any(r.due) and not all(r.due)]
    assert mixed, "no step was mixed"


def test_without_a_reference_nothing_is_kept(pipe):
    plain = edit(pipe, image=None)
    fluxfire.optimize(pipe, [ReferenceCache()])
    assert np.array_equal(edit(pipe, image=None), plain)
    assert refreshes(pipe) == []
    assert fluxfire.report(pipe).passes[0].facts == {"refreshed": 0, "reused": 0, "kept_bytes": 0}


def keeping():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is ReferenceKV]


def test_nothing_is_kept_after_a_generation_even_one_that_raised(pipe):
    fluxfire.optimize(pipe, [ReferenceCache(NEVER)])
    during = []
    expected = edit(pipe, callback_on_step_end=lambda *_: during.append(len(keeping())) or {})
    assert during == [5, 5, 5]
    assert keeping() == []

    def fail(*_):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        edit(pipe, callback_on_step_end=fail)
    assert keeping() == []
    assert np.array_equal(edit(pipe), expected)
    assert edit(pipe, (48, 32), **TWO).shape == (2, 32, 48, 3)
    assert np.array_equal(edit(pipe), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_beside_a_first_block_cache_that_never_hits_pictures_are_its_own(reverse):
    passes = [FirstBlockCache(0), ReferenceCache(schedule=[0, 3])]
    pipe = fluxfire.optimize(tiny_kontext(), passes[::-1] if reverse else passes)
    assert np.array_equal(edit(pipe, steps=6), edit(cached(schedule=[0, 3]), steps=6))
    assert hits_of(pipe) == []


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("by", "expected"),
    [({"schedule": [0, 3]}, [0, 3, 4]), ({"warmup_steps": 4}, [0, 1, 2, 3, 4])],
)
def test_a_refresh_that_a_hit_left_out_is_made_up_for(reverse, by, expected):
    passes = [FirstBlockCache(schedule=[2, 3]), ReferenceCache(NEVER, **by)]
    pipe = fluxfire.optimize(tiny_kontext(), passes[::-1] if reverse else passes)
    counts = count_blocks(pipe)
    edit(pipe, steps=7)
    assert hits_of(pipe) == [2, 3]
    assert counts == [7, 5, 5, 5, 5]
    assert refreshed(pipe) == expected


@pytest.mark.parametrize("reverse", [False, True])
def test_so_is_one_that_drift_asked_for(reverse):
    """The step with the largest drift hits. The next step has no drift relative to it."""
    probe = cached(NEVER, drift=1e9)
    edit(probe, steps=7)
    drifts = [0.0, *(r.drifts[0] for r in refreshes(probe)[1:])]
    step = max(range(6), key=drifts.__getitem__)
    limit = max(0.99 * drifts[step], (drifts[step] + max(drifts[:step])) / 2)
    passes = [FirstBlockCache(schedule=[step]), ReferenceCache(NEVER, drift=limit)]
    pipe = fluxfire.optimize(tiny_kontext(), passes[::-1] if reverse else passes)
    edit(pipe, steps=7)
    assert hits_of(pipe) == [step]
    assert refreshes(pipe)[step + 1].drifts[0] < limit
    assert refreshed(pipe)[:3] == [0, step, step + 1]


@pytest.mark.parametrize("others", [[], [FusedBlocks()]], ids=["plain", "fused"])
def test_attention_arguments_pass_straight_through(others, reference):
    mask = torch.ones(1, 1, 1, 24 + 2 * TOKENS).bool()
    mask[..., ::2] = False
    call = {"joint_attention_kwargs": {"attention_mask": mask}}
    plain = edit(tiny_kontext(), **call)
    assert np.abs(plain - reference).max() > 1e-4
    pipe = fluxfire.optimize(tiny_kontext(), [*others, ReferenceCache(NEVER)])
    assert np.array_equal(edit(pipe, **call), plain)
    assert refreshes(pipe) == []


@pytest.mark.parametrize("others", [[], [FusedBlocks()]], ids=["plain", "fused"])
def test_gradients_pass_straight_through(others, reference, monkeypatch):
    pipe = fluxfire.optimize(tiny_kontext(), [*others, ReferenceCache(NEVER)])
    plain, made = TransformerCall.__call__, []

    def with_gradients(self, *args, **kwargs):
        with torch.enable_grad():
            made.append(plain(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(TransformerCall, "__call__", with_gradients)
    assert np.array_equal(edit(pipe), reference)
    assert all(out[0].requires_grad for out in made)
    assert refreshes(pipe) == []


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_lora_has_its_effect(scale):
    call = {} if scale is None else {"joint_attention_kwargs": {"scale": scale}}
    expected = edit(by_hand(with_lora(tiny_kontext()), [0]), **call)
    pipe = fluxfire.optimize(tiny_kontext(), [ReferenceCache(NEVER)])
    without = edit(pipe)
    made = edit(with_lora(pipe), **call)
    assert refreshed(pipe) == [0]
    assert np.abs(made - expected).max() < CLOSE
    assert np.abs(made - without).max() > 1e-3


def test_controlnet_residuals_reach_the_noise_alone_between_refreshes(monkeypatch):
    """No Kontext pipeline of diffusers supports ControlNet; the test adds the residuals itself."""
    width = tiny_kontext().transformer.inner_dim
    generator = torch.Generator().manual_seed(0)
    samples = {
        "controlnet_block_samples": [torch.randn(1, 2 * TOKENS, width, generator=generator)],
        "controlnet_single_block_samples": [torch.randn(1, 2 * TOKENS, width, generator=generator)],
    }
    plain = TransformerCall.__call__
    pipe, every = cached(NEVER), fluxfire.optimize(tiny_kontext(), [EVERY])
    without = edit(pipe)
    monkeypatch.setattr(
        TransformerCall, "__call__", lambda self, *a, **k: plain(self, *a, **k, **samples)
    )
    stock = tiny_kontext()
    forward = stock.transformer.forward
    stock.transformer.forward = lambda *a, **k: forward(*a, **k, **samples)
    assert np.array_equal(edit(every), edit(stock))
    # The oracle adds the residuals of the noise tokens only; diffusers would add all of them.
    hand = by_hand(tiny_kontext(), [0])
    for index, block in enumerate(KONTEXT.blocks(hand.transformer)):
        kind = "block_samples" if index < 2 else "single_block_samples"
        block.register_forward_hook(
            lambda _, __, out, add=samples[f"controlnet_{kind}"][0]: (
                out[0],
                out[1] + add[:, : out[1].shape[1]],
            )
        )
    made = edit(pipe)
    assert np.abs(made - edit(hand)).max() < CLOSE
    assert np.abs(made - without).max() > 1e-3


def test_foreign_processors_are_refused(pipe):
    class Own(FluxAttnProcessor):
        pass

    pipe.transformer.single_transformer_blocks[1].attn.processor = Own()
    with pytest.raises(PlanError, match="attention runs through Own, which cannot keep the ref"):
        fluxfire.optimize(pipe, [ReferenceCache()])
    with pytest.raises(PlanError, match="runs through FluxIPAdapterAttnProcessor, which cannot"):
        fluxfire.optimize(with_ip_adapter(tiny_kontext()), [ReferenceCache()])


def test_a_processor_that_comes_later_is_refused_by_name(pipe):
    fluxfire.optimize(pipe, [ReferenceCache()])
    with_ip_adapter(pipe)
    with pytest.raises(FluxfireError, match="replaced after ReferenceCache was .* FluxIPAdap"):
        edit(pipe)
    fluxfire.restore(pipe)


def test_restore_brings_processors_back_and_their_kernels_were_used(pipe):
    from diffusers.models.attention_dispatch import AttentionBackendName

    own = [a.processor for a in (b.attn for b in KONTEXT.blocks(pipe.transformer))]
    own[0]._attention_backend = AttentionBackendName._NATIVE_MATH
    fluxfire.optimize(pipe, [ReferenceCache(NEVER)])
    first, second, *_ = (b.attn.processor for b in KONTEXT.blocks(pipe.transformer))
    assert first._attention_backend is AttentionBackendName._NATIVE_MATH
    assert second._attention_backend is None
    edit(pipe)
    fluxfire.restore(pipe)
    back = [b.attn.processor for b in KONTEXT.blocks(pipe.transformer)]
    assert all(map(lambda one, other: one is other, back, own))


def test_using_changes_the_spacing_for_a_while(pipe):
    plain = edit(pipe, steps=6)
    fluxfire.optimize(pipe, [ReferenceCache(0)])
    with fluxfire.using(pipe, ReferenceCache(NEVER)):
        changed = edit(pipe, steps=6)
        assert refreshed(pipe) == [0]
    assert np.array_equal(edit(pipe, steps=6), plain)
    assert np.array_equal(changed, edit(cached(NEVER), steps=6))
    facts = fluxfire.report(pipe).passes[0].facts
    assert (facts["refreshed"], facts["reused"]) == (1, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spacing": -0.1}, "spacing=-0.1; it must be 0 or more"),
        ({"spacing": float("nan")}, "spacing=nan; it must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps=-1; it must be a whole number, 0 or more"),
        ({"tail_steps": -2}, "tail_steps=-2; it must be a whole number, 0 or more"),
        ({"drift": -1}, "drift=-1; it must be a number, 0 or more, or None"),
        ({"drift": float("nan")}, "drift=nan; it must be a number, 0 or more, or None"),
        ({"predict": "cubic"}, "predict='cubic'; it must be 'hold' or 'linear'"),
        ({"schedule": []}, "schedule=(); it must have step 0"),
        ({"schedule": [2, 1]}, "schedule=(1, 2); it must have step 0"),
        ({"schedule": [0, -1]}, "schedule=(-1, 0); it must have step 0"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match="must") as caught:
        ReferenceCache(**settings)
    assert words in str(caught.value)
    with pytest.raises(TypeError, match="spacing='0'; it must be a number"):
        ReferenceCache("0")


@pytest.mark.slow
@pytest.mark.parametrize("others", half([[FusedBlocks()], []], 0), ids=str)
def test_refreshes_and_the_steps_between_are_a_graph_each(others):
    by = ReferenceCache(schedule=[0, 3])
    sizes = ((32, 32), (48, 32), (32, 64))
    plain = fluxfire.optimize(tiny_kontext(), [*others, by])
    expected = [edit(plain, size, steps=6) for size in sizes]
    pipe = fluxfire.optimize(tiny_kontext(), [*others, by, Compile(fullgraph=True)])
    for size, picture in zip(sizes, expected, strict=True):
        assert np.abs(edit(pipe, size, steps=6) - picture).max() < 1e-4
    runs = fluxfire.report(pipe).runs
    assert [run.graph_breaks for run in runs] == [0, 0, 0]
    assert runs[0].compiles <= 6  # double, single, and single after a single: each of both
    assert runs[2].compiles == 0  # the second size made the graphs dynamic


@exhaustive
@pytest.mark.slow
def test_batches_that_refresh_in_part_stay_compiled():
    """They need more than the 8 graphs that dynamo allows by default."""
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this torch has no limit of a compilation's own")
    by = ReferenceCache(NEVER, drift=0.31)
    pipe = fluxfire.optimize(tiny_kontext(), [by, Compile(fullgraph=True)])
    edit(pipe, steps=6)
    for compiles in (True, False):
        prompts, generators = batch(4)
        edit(pipe, prompt=prompts, generator=generators, steps=10)
        run = fluxfire.report(pipe).runs[-1]
        assert (run.compiles > 0, run.graph_breaks) == (compiles, 0)
        assert any(any(r.due) and not all(r.due) for r in refreshes(pipe))


def test_a_warmup_run_with_a_drift_makes_the_graphs_of_a_batch(monkeypatch):
    """With a drift a batch has a refresh mask even if all samples refresh."""
    pipe = fluxfire.optimize(tiny_kontext(), [ReferenceCache(0.2, drift=0.31, tail_steps=2)])
    ways = set()
    attend = ReferenceAttnProcessor._attend

    def seen(self, attn, image, text, *more):
        kv = more[-1]
        ways.add((text is None, kv.extract, kv.refresh_mask is None))
        return attend(self, attn, image, text, *more)

    monkeypatch.setattr(ReferenceAttnProcessor, "_attend", seen)
    prompts, generators = batch(3)
    fluxfire.warmup(pipe, [(32, 32)], prompt=prompts, generator=generators, _auto_resize=False)
    warmed = set(ways)
    ways.clear()
    edit(pipe, prompt=prompts, generator=batch(3)[1], steps=9)
    assert len(ways) == 5  # the first block, which measures the drift, has no mask
    assert ways <= warmed


def test_a_warmup_run_takes_every_way_once():
    """Two steps with distant sigmas: a refresh, then a reuse, and no hit."""
    everything = FirstBlockCache(1e9, warmup_steps=0, tail_steps=0, max_consecutive_hits=None)
    pipe = fluxfire.optimize(tiny_kontext(), [everything, ReferenceCache(0.01)])
    fluxfire.warmup(pipe, [(32, 32)], _auto_resize=False)
    assert fluxfire.report(pipe).runs[-1].step_kinds == ["computed", "reused"]
    edit(pipe, steps=2)
    assert fluxfire.report(pipe).runs[-1].step_kinds == ["computed", "hit"]
    with fluxfire.using(pipe, FirstBlockCache(0)):
        edit(pipe, steps=2)
    assert fluxfire.report(pipe).runs[-1].step_kinds == ["computed", "computed"]
