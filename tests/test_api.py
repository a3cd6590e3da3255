"""optimize, and everything a user goes on doing with the pipeline afterwards."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from peft import LoraConfig

import fluxfire
from doubles import Bare, Fake, HalfTheTokens, Listen, ScaleTemb, SkipBlock
from fluxfire import Change, Finding
from fluxfire.errors import BusyError, FluxfireError, FluxfireWarning, PassError, PlanError
from fluxfire.passes import (
    Compile,
    FirstBlockCache,
    Float8,
    FusedBlocks,
    InductorPatch,
    MegaCache,
    MemoryLayout,
    QKVFusion,
)
from fluxfire.protocol import BOUNDARIES
from fluxfire.runtime.conductor import conductor_of
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from own_passes import own_passes

EAGER = [InductorPatch(), QKVFusion(), MemoryLayout()]
CLOSE = 1e-5


def test_it_returns_the_same_object_of_the_same_kind(kind):
    pipe = tiny_kontext(kind)
    plain = edit(pipe)
    cls = type(pipe)
    assert fluxfire.optimize(pipe, EAGER) is pipe
    assert isinstance(pipe, cls)
    assert type(pipe).__name__ == cls.__name__
    assert isinstance(pipe.transformer, FluxTransformer2DModel)
    assert np.abs(edit(pipe) - plain).max() < CLOSE
    fluxfire.restore(pipe)
    assert type(pipe) is cls
    assert np.array_equal(edit(pipe), plain)


def test_no_passes_and_no_wrappers_are_bitwise(pipe, reference):
    fluxfire.optimize(pipe, [])
    assert np.array_equal(edit(pipe), reference)


def test_text_to_image(pipe):
    plain = edit(pipe, image=None)
    fluxfire.optimize(pipe, EAGER)
    assert np.abs(edit(pipe, image=None) - plain).max() < CLOSE


def test_true_cfg_and_batches(pipe):
    call = {"prompt": ["a", "b"], "negative_prompt": ["c", "d"], "true_cfg_scale": 3.0}
    plain = edit(pipe, **call)
    fluxfire.optimize(pipe, EAGER)
    assert np.abs(edit(pipe, **call) - plain).max() < CLOSE


def test_save_pretrained_while_optimized(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "plain")
    fluxfire.optimize(pipe, EAGER)
    pipe.save_pretrained(tmp_path / "optimized")
    for component in ("transformer", "vae"):
        name = f"{component}/diffusion_pytorch_model.safetensors"
        plain, ours = tmp_path / "plain" / name, tmp_path / "optimized" / name
        assert plain.read_bytes() == ours.read_bytes()
    again = FluxKontextPipeline.from_pretrained(tmp_path / "optimized")
    assert type(again.transformer) is FluxTransformer2DModel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_while_optimized(dtype):
    plain = edit(tiny_kontext().to(dtype))
    pipe = fluxfire.optimize(tiny_kontext(), EAGER).to(dtype)
    assert pipe.dtype == dtype
    assert np.abs(edit(pipe) - plain).max() < 0.1
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_plain_pipelines(pipe, reference, duplicate):
    fluxfire.optimize(pipe, EAGER)
    twin = duplicate(pipe)
    assert type(twin) is FluxKontextPipeline
    assert type(twin.transformer) is FluxTransformer2DModel
    fluxfire.restore(pipe)
    assert np.abs(edit(twin) - reference).max() < CLOSE
    assert fluxfire.report(twin).passes == ()


def test_from_pipe_shares_the_model_and_works(pipe):
    plain = edit(FluxKontextInpaintPipeline.from_pipe(pipe))
    fluxfire.optimize(pipe, EAGER)
    sister = FluxKontextInpaintPipeline.from_pipe(pipe)
    assert np.abs(edit(sister) - plain).max() < CLOSE
    with pytest.raises(PlanError, match="already optimized through another pipeline"):
        fluxfire.optimize(sister, [ScaleTemb()])


def test_a_second_pipeline_and_the_classes_never_notice(pipe, reference):
    other = tiny_kontext()
    edit(other)
    before = fingerprint(other)
    fluxfire.optimize(pipe, [*EAGER, SkipBlock()])
    edit(pipe)
    assert differences(before, fingerprint(other)) == []
    assert np.array_equal(edit(other), reference)


def test_a_dropped_pipeline_is_collected():
    pipe = tiny_kontext()
    fluxfire.optimize(pipe, EAGER)
    edit(pipe)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_a_second_optimize_adds_to_the_first(pipe, reference):
    fluxfire.optimize(pipe, [QKVFusion()])
    fluxfire.optimize(pipe, [MemoryLayout()])
    assert [p.name for p in fluxfire.report(pipe).passes] == ["qkv-fusion", "memory-layout"]
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)


def test_a_second_optimize_says_why_it_cannot(pipe):
    fluxfire.optimize(pipe, [QKVFusion()])
    with pytest.raises(PlanError, match=r"qkv-fusion is already applied, as QKVFusion\(") as e:
        fluxfire.optimize(pipe, [QKVFusion(vae=False)])
    assert "in place of what is applied, restore(pipe) first" in str(e.value)
    with pytest.raises(PlanError, match="listen .stage environment. must come before qkv-fusion"):
        fluxfire.optimize(pipe, [Listen()])
    assert len(fluxfire.report(pipe).passes) == 1


def test_a_failed_second_optimize_keeps_the_first(pipe):
    class Failing(ScaleTemb):
        def apply(self, tx):
            super().apply(tx)
            raise RuntimeError("no")

    fluxfire.optimize(pipe, [QKVFusion()])
    picture = edit(pipe)
    with pytest.raises(PassError, match="scale-temb failed while it was applied") as caught:
        fluxfire.optimize(pipe, [Failing()])
    assert caught.value.pass_name == "scale-temb"
    assert np.array_equal(edit(pipe), picture)
    assert [p.name for p in fluxfire.report(pipe).passes] == ["qkv-fusion"]


def test_an_undo_that_fails_is_admitted(pipe):
    class Stuck(ScaleTemb):
        def apply(self, tx):
            tx.on_undo(lambda: 1 / 0)
            raise RuntimeError("on purpose")

    with pytest.raises(PassError, match="1 edits could not be undone; reload the pipeline"):
        fluxfire.optimize(pipe, [Stuck()])


def test_a_pipeline_that_shares_the_transformer_runs_plain_within_a_callback(pipe):
    other = FluxKontextPipeline(**pipe.components)
    other.scheduler = copy.deepcopy(pipe.scheduler)  # which holds a generation's progress
    plain = edit(other)
    fluxfire.optimize(pipe, [FirstBlockCache(10.0)])
    inner = []

    def again(*_):
        inner.append(edit(other))
        return {}

    edit(pipe, callback_on_step_end=again)
    assert fluxfire.report(pipe).runs[-1].calls == 3
    assert all(np.array_equal(picture, plain) for picture in inner)


def test_a_pass_that_returns_no_change_is_rolled_back(pipe, reference):
    class Mute(ScaleTemb):
        def apply(self, tx):
            super().apply(tx)

    with pytest.raises(PassError, match="returned None, not a fluxfire.Change"):
        fluxfire.optimize(pipe, [Mute()])
    assert np.array_equal(edit(pipe), reference)


def test_two_threads_in_one_pipeline_get_a_clear_error(pipe, reference):
    fluxfire.optimize(pipe, [])
    inside, done = threading.Event(), threading.Event()

    def wait(_pipe, _step, _t, tensors):
        inside.set()
        done.wait(600)
        return tensors

    result = []
    thread = threading.Thread(target=lambda: result.append(edit(pipe, callback_on_step_end=wait)))
    thread.start()
    assert inside.wait(600)
    try:
        with pytest.raises(BusyError, match="already generating in another thread"):
            edit(pipe)
        with pytest.raises(BusyError, match="cannot restore: the pipeline is generating"):
            fluxfire.restore(pipe)
        with pytest.raises(BusyError, match="another thread"):
            pipe.transformer(img_ids=None, txt_ids=None, timestep=None)
    finally:
        done.set()
        thread.join()
    assert np.array_equal(result[0], reference)


def test_a_call_within_a_call_gets_a_clear_error(pipe):
    fluxfire.optimize(pipe, [])

    def again(pipe, *_):
        edit(pipe)

    with pytest.raises(BusyError, match="in this call's own thread"):
        edit(pipe, callback_on_step_end=again)
    edit(pipe)


def test_a_replaced_transformer_is_noticed(pipe):
    fluxfire.optimize(pipe, [])
    mine = pipe.transformer
    pipe.transformer = tiny_kontext(seed=1).transformer
    with pytest.raises(FluxfireError, match="replaced after optimize"):
        edit(pipe)
    pipe.transformer = mine
    edit(pipe)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: p.transformer.to("meta"), "the transformer's weights are on the meta device"),
        (lambda p: p.text_encoder_2.to("meta"), "the text_encoder_2's weights are on the meta"),
        (
            lambda p: setattr(p, "transformer", torch.compile(p.transformer)),
            "is an OptimizedModule, not .* wrapped by torch.compile: pass the plain model and add",
        ),
        (lambda p: setattr(p, "transformer", p.vae), "not a FluxTransformer2DModel"),
    ],
)
def test_pipelines_that_cannot_be_optimized(pipe, break_it, words):
    break_it(pipe)
    with pytest.raises(PlanError, match=words) as caught:
        fluxfire.optimize(pipe, [QKVFusion()])
    assert "Nothing was changed" in str(caught.value)


def test_something_that_is_no_kontext_pipeline():
    with pytest.raises(PlanError, match="works on FluxKontextPipeline and .*, not on dict"):
        fluxfire.optimize({})


def test_everything_wrong_is_said_at_once_with_a_list_that_works(pipe):
    edit(pipe)
    before = fingerprint(pipe)
    with pytest.raises(PlanError) as caught:
        fluxfire.optimize(
            pipe, [Compile(options={"no_such": 1}), QKVFusion(), MemoryLayout, Fake(), Fake()]
        )
    assert str(caught.value) == (
        "This list of passes cannot be applied. Nothing was changed.\n"
        "  - MemoryLayout is a class; pass an instance, MemoryLayout()\n"
        "  - qkv-fusion (stage weights) must come before compile (stage compile): blocks, "
        "caches and graphs take the weights as they find them\n"
        "  - memory-layout (stage weights) must come before compile (stage compile): blocks, "
        "caches and graphs take the weights as they find them\n"
        "  - fake (stage weights) must come before compile (stage compile): blocks, caches "
        "and graphs take the weights as they find them\n"
        "  - fake is in the list twice, as Fake(); keep one\n"
        "  - compile: inductor has no option no_such; torch._inductor.list_options() lists "
        "them\n"
        "A list that would work: [QKVFusion(), MemoryLayout(), Fake()]\n"
        "  left out: Compile(options=(('no_such', 1),)), because inductor has no option no_such\n"
        "  left out: Fake(), because fake is in the list already"
    )
    assert differences(before, fingerprint(pipe)) == []


def test_on_top_of_applied_passes_too_a_list_that_works_is_named(pipe):
    fluxfire.optimize(pipe, [FirstBlockCache()])
    refused = fluxfire.plan(pipe, [QKVFusion(), FirstBlockCache(), Compile(), "nope"])
    assert refused.suggestion == (Compile(),)
    assert refused.left_out == (
        "'nope', because it is no pass",
        "QKVFusion(), because first-block-cache, which must come after it, is applied already",
        "FirstBlockCache(), because first-block-cache is applied already",
    )


def test_names_of_presets_and_passes(pipe):
    planned = fluxfire.plan(pipe, ["inductor-patch", "memory-layout"])
    assert [s.pass_ for s in planned.steps] == [InductorPatch(), MemoryLayout()]
    assert [s.pass_.name for s in fluxfire.plan(pipe).steps] == [
        p.name for p in fluxfire.presets.faithful
    ]
    with pytest.raises(
        PlanError, match="no preset 'fastest'; there are faithful, balanced, fast, article"
    ):
        fluxfire.optimize(pipe, "fastest")
    with pytest.raises(PlanError, match="no pass 'qkv'; there are attention, compile, "):
        fluxfire.optimize(pipe, ["qkv"])
    with pytest.raises(PlanError, match=r"did you mean passes=\[Compile\("):
        fluxfire.optimize(pipe, Compile())


def test_report(pipe):
    assert str(fluxfire.report(pipe)) == "No passes applied, nothing generated."
    fluxfire.optimize(pipe, EAGER)
    edit(pipe, steps=4)
    edit(pipe, steps=2, negative_prompt="x", true_cfg_scale=2.0)
    facts = fluxfire.report(pipe).to_dict()
    assert [p["name"] for p in facts["passes"]] == [p.name for p in EAGER]
    fusion = facts["passes"][1]
    assert fusion["change"] == {
        "count": 9,
        "what": "query-key-value triples fused, storage shared",
        "bytes": 0,
        "host_bytes": 0,
    }
    first, second = facts["generations"]
    assert (first["steps"], first["transformer_calls"]) == (4, 4)
    assert (second["steps"], second["transformer_calls"]) == (2, 4)
    assert first["tokens"] == {"noise": 64, "reference": 64, "text": 24}
    assert 0 < first["seconds_a_step"] < first["seconds"]
    assert first["compiles"] == first["recompiles"] == first["graph_breaks"] == 0
    printed = str(fluxfire.report(pipe))
    assert "qkv-fusion      weights      close" in printed


def test_warmup_runs_exactly_the_sizes(pipe):
    listen = Listen()
    with pytest.raises(PlanError, match="call optimize"):
        fluxfire.warmup(pipe, sizes=[(32, 32)])
    fluxfire.optimize(pipe, [listen])
    state = torch.get_rng_state()
    fluxfire.warmup(pipe, sizes=[(32, 32), (64, 48)], max_sequence_length=24, _auto_resize=False)
    calls = listen.tallies[-1].calls
    assert [(c.tokens.noise, c.tokens.reference) for c in calls[::2]] == [(64, 64), (192, 192)]
    fluxfire.warmup(pipe, sizes=[(32, 32)], references=[], max_sequence_length=24)
    assert calls[-1].tokens.reference == 0
    fluxfire.warmup(
        pipe,
        sizes=[(32, 32)],
        references=[(48, 32), (64, 64)],
        _auto_resize=False,
        max_sequence_length=24,
    )
    assert [c.tokens.reference for c in calls[-4::2]] == [96, 256]
    assert torch.equal(torch.get_rng_state(), state)
    assert fluxfire.report(pipe).warmup_seconds > 0
    with pytest.raises(PlanError, match=r"size \(30, 32\): it must be \(width, height\)"):
        fluxfire.warmup(pipe, sizes=[(30, 32)])


def test_warmup_shows_sizes_and_phases_in_one_bar(pipe):
    said = io.StringIO()
    pipe.set_progress_bar_config(file=said, mininterval=0, disable=False)
    config = dict(pipe._progress_bar_config)
    fluxfire.optimize(pipe, [])
    fluxfire.warmup(pipe, [(32, 32), (48, 32)], max_sequence_length=24, _auto_resize=False)
    for words in ("warm-up 32x32: load", "warm-up 32x32: step 2 of 2", "2/2"):
        assert words in said.getvalue()
    assert pipe._progress_bar_config == config
    said.truncate(0)
    edit(pipe)
    assert "warm-up" not in said.getvalue()


def test_warmup_of_an_inpainting_pipeline():
    pipe = fluxfire.optimize(tiny_kontext("inpaint"), [Listen()])
    fluxfire.warmup(pipe, sizes=[(64, 48)], max_sequence_length=24, _auto_resize=False)
    assert Listen.tallies[-1].calls[0].tokens.noise == 192


def test_after_warmup_is_called_with_a_transaction_that_restore_undoes(pipe):
    class Late(ScaleTemb):
        def after_warmup(self, tx):
            tx.setattr(tx.pipe.transformer, "late", True)

    fluxfire.optimize(pipe, [Late()])
    fluxfire.warmup(pipe, sizes=[(32, 32)], _auto_resize=False, max_sequence_length=24)
    assert pipe.transformer.late
    fluxfire.restore(pipe)
    assert not hasattr(pipe.transformer, "late")


def test_a_late_failure_of_after_warmup_is_rolled_back(pipe):
    class Late(ScaleTemb):
        def after_warmup(self, tx):
            tx.setattr(tx.pipe.transformer, "late", True)
            raise RuntimeError("too late")

    fluxfire.optimize(pipe, [Late()])
    with pytest.raises(PassError, match="scale-temb failed"):
        fluxfire.warmup(pipe, sizes=[(32, 32)], _auto_resize=False, max_sequence_length=24)
    assert not hasattr(pipe.transformer, "late")


@pytest.mark.parametrize("references", [[(0, 0)], [32], [(32, 32.5)]])
def test_warmup_refuses_references_that_are_no_sizes(pipe, references):
    fluxfire.optimize(pipe, [])
    with pytest.raises(PlanError, match="cannot use a reference of size"):
        fluxfire.warmup(pipe, sizes=[(32, 32)], references=references)


def test_a_suggestion_is_tried_before_it_is_made(pipe):
    planned = fluxfire.plan(pipe, [Compile(region="transformer"), SkipBlock()])
    assert planned.suggestion == (SkipBlock(), Compile())
    assert "A list that would work: [SkipBlock(), Compile()]" in str(planned)
    assert fluxfire.plan(pipe, planned.suggestion).ok
    hopeless = fluxfire.plan(pipe, [Compile(options={"no_such": 1})])
    assert hopeless.suggestion is None
    assert "would work" not in str(hopeless)


def test_a_suggestion_follows_the_advice_beside_it(pipe):
    compiled = fluxfire.plan(pipe, [FirstBlockCache(), Compile(region="transformer", dynamic=True)])
    assert compiled.suggestion == (FirstBlockCache(), Compile(dynamic=True))
    (told,) = compiled.left_out
    assert told.startswith("Compile(region='transformer', dynamic=True), because ")
    assert told.endswith("; in its place: Compile(dynamic=True)")
    assert "leave the fusion out" in str(fluxfire.plan(pipe, [QKVFusion(), Float8()]))
    fused = fluxfire.plan(pipe, [QKVFusion(), Float8()])
    assert fused.suggestion == (Float8(),)
    assert fused.left_out[0].startswith("QKVFusion(), because float8 refuses it: ")


@pytest.mark.parametrize("turned", [False, True])
def test_the_order_asked_for_does_not_decide_whether_a_list_is_found(pipe, turned):
    class Impossible(HalfTheTokens):
        name = "impossible"

        def check(self, target):
            yield Finding("error", "impossible here", "do not")

    asked = [Compile(), HalfTheTokens(), Impossible()]
    planned = fluxfire.plan(pipe, asked[::-1] if turned else asked)
    assert planned.suggestion == (HalfTheTokens(), Compile())
    (told,) = planned.left_out
    why = "half-the-tokens fills the slot 'block-cache'" if not turned else "impossible here"
    assert told == f"Impossible(), because {why}"
    assert fluxfire.plan(pipe, planned.suggestion).ok


def test_rows_with_errors_are_not_called_ready(pipe):
    rows = str(fluxfire.plan(pipe, [Compile(), QKVFusion(), MemoryLayout])).splitlines()[2:5]
    assert [row.split("  ")[-1].strip() for row in rows] == [
        "ready", "error: see below", "error: see below",
    ]  # fmt: skip
    pipe.transformer.to("meta")
    assert "ready" not in str(fluxfire.plan(pipe))


def test_a_plan_and_a_report_show_settings_that_are_not_the_defaults(pipe):
    passes = [QKVFusion(), FirstBlockCache(threshold=0.2)]
    shown = "settings: FirstBlockCache(threshold=0.2)"
    assert shown in str(fluxfire.plan(pipe, passes)).splitlines()
    fluxfire.optimize(pipe, passes)
    assert shown in str(fluxfire.report(pipe)).splitlines()
    assert shown in str(fluxfire.plan(pipe, [Compile()])).splitlines()
    assert "settings" not in str(fluxfire.plan(tiny_kontext(), [FirstBlockCache(), Compile()]))


def test_a_suggestion_ends_where_advice_goes_in_circles(pipe):
    class Stubborn(ScaleTemb):
        def check(self, target):
            yield Finding("error", "no", "try another", instead=Stubborn())

    planned = fluxfire.plan(pipe, [MemoryLayout(), Stubborn()])
    assert planned.suggestion == (MemoryLayout(),)


def test_unknown_names_do_not_hide_other_mistakes(pipe):
    with pytest.raises(PlanError) as caught:
        fluxfire.optimize(pipe, ["qkv", MemoryLayout, "nope", QKVFusion()])
    said = str(caught.value)
    for words in ("no pass 'qkv'", "MemoryLayout is a class", "no pass 'nope'"):
        assert words in said
    assert said.startswith("This list of passes cannot be applied. Nothing was changed.")


def test_a_check_that_fails_is_blamed_on_its_pass(pipe):
    class Clumsy(ScaleTemb):
        def check(self, target):
            raise KeyError("x")

    with pytest.raises(PlanError, match="scale-temb: its check.. failed with KeyError: 'x'"):
        fluxfire.optimize(pipe, [Clumsy()])


def test_a_replaced_component_is_put_back_in_the_pipelines_config_too(pipe):
    class Replaces(ScaleTemb):
        def apply(self, tx):
            tx.setattr(tx.pipe, "scheduler", FlowMatchHeunDiscreteScheduler())
            return Change(1, "schedulers")

    config = dict(pipe.config)
    fluxfire.optimize(pipe, [Replaces()])
    assert dict(pipe.config) != config
    fluxfire.restore(pipe)
    assert dict(pipe.config) == config


def test_setattr_is_undone_across_torchs_registries(pipe):
    """A torch module moves an attribute to another dictionary when its type changes."""
    from torch import nn

    class Replaces(ScaleTemb):
        def apply(self, tx):
            transformer = tx.pipe.transformer
            tx.setattr(transformer, "plain", nn.Identity())
            tx.setattr(transformer, "function", nn.Identity())
            tx.setattr(transformer, "proj_out", None)
            return Change(3, "attributes")

    pipe.transformer.plain = None
    pipe.transformer.function = len
    edit(pipe)
    before = fingerprint(pipe)
    fluxfire.optimize(pipe, [Replaces()])
    fluxfire.restore(pipe)
    assert differences(before, fingerprint(pipe)) == []


def test_a_check_that_yields_nonsense_is_blamed_on_its_pass(pipe):
    class Clumsy(ScaleTemb):
        def check(self, target):
            return ["bad"]

    with pytest.raises(PlanError, match="scale-temb: its check.. gave 'bad', not a Finding"):
        fluxfire.optimize(pipe, [Clumsy()])


def test_hints_for_lists_written_in_other_ways(pipe):
    with pytest.raises(PlanError, match=r"did you mean passes=\['qkv-fusion'\]"):
        fluxfire.optimize(pipe, "qkv-fusion")
    with pytest.raises(PlanError, match=r"\)\] is a list within the list; write \* before it"):
        fluxfire.optimize(pipe, [[QKVFusion()]])
    with pytest.raises(PlanError, match="did you mean 'qkv-fusion'"):
        fluxfire.optimize(pipe, ["qkv_fusion"])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            fluxfire.presets.faithful,
            "presets.faithful is a list within the list; write *presets.faithful",
        ),
        (
            "faithful",
            "'faithful' is a preset, not a pass; write *presets.faithful in its place",
        ),
    ],
)
def test_a_preset_within_a_list_is_unpacked_in_the_suggestion(pipe, entry, said):
    planned = fluxfire.plan(pipe, [entry, FirstBlockCache(0.2)])
    assert planned.problems[0] == said
    assert planned.suggestion == (
        *fluxfire.presets.faithful[:-1], FirstBlockCache(0.2), fluxfire.presets.faithful[-1]
    )  # fmt: skip
    assert planned.left_out == ()


def test_the_passes_of_a_list_within_the_list_are_read_too(pipe):
    planned = fluxfire.plan(pipe, [[QKVFusion(), "nope"], MemoryLayout])
    assert planned.suggestion == (QKVFusion(), MemoryLayout())
    assert any("no pass 'nope'" in line for line in planned.problems)


def test_a_class_that_needs_settings_is_not_made_up(pipe):
    class Needy(ScaleTemb):
        def __init__(self, amount):
            pass

    assert fluxfire.plan(pipe, [Needy, QKVFusion()]).suggestion == (QKVFusion(),)


def test_a_pass_twice_is_one_mistake(pipe):
    planned = fluxfire.plan(pipe, [QKVFusion(), QKVFusion(vae=False)])
    assert len(planned.complaints()) == 1
    assert planned.suggestion == (QKVFusion(),)


def test_an_early_pass_after_a_late_one_is_told_the_way(pipe):
    fluxfire.optimize(pipe, [SkipBlock()])
    with pytest.raises(PlanError, match=r"skip-block is already applied\n.*restore\(pipe\) first"):
        fluxfire.optimize(pipe, [QKVFusion()])


def test_a_preset_on_another_is_refused_in_few_words(pipe):
    fluxfire.optimize(pipe, [FusedBlocks(), Compile()])
    with pytest.raises(PlanError) as refused:
        fluxfire.optimize(pipe, [FusedBlocks(), FirstBlockCache(), Compile()])
    assert str(refused.value).splitlines()[1:] == [
        "  - fused-blocks is already applied, as FusedBlocks()",
        (
            "  - first-block-cache (stage caching) must come before compile (stage compile): "
            f"{BOUNDARIES['caching']}; compile is already applied"
        ),
        "  - compile is already applied, as Compile()",
        "To have this list in place of what is applied, restore(pipe) first.",
    ]


def test_a_misspelt_pass_has_its_place_in_the_list_that_would_work(pipe):
    with pytest.raises(PlanError) as refused:
        fluxfire.optimize(pipe, ["first_block_cach", "qkv-fuson", "xyzzy"])
    assert refused.value.suggestion == (QKVFusion(), FirstBlockCache())
    assert "left out: 'xyzzy', because it is no pass" in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        (QKVFusion, r"did you mean passes=\[QKVFusion\(\)\]"),
        (QKVFusion(vae=False), r"did you mean passes=\[QKVFusion\(vae=False\)\]"),
        ("qkv-fusion, compile", r"did you mean passes=\['qkv-fusion', 'compile'\]"),
    ],
)
def test_what_is_no_list_is_told_how_to_be_one(pipe, wrong, meant):
    with pytest.raises(PlanError, match=meant):
        fluxfire.optimize(pipe, wrong)


@pytest.mark.parametrize("verb", [fluxfire.restore, fluxfire.report])
def test_what_is_no_pipeline_is_refused_by_every_verb(verb):
    with pytest.raises(PlanError, match="not on int"):
        verb(3)


def test_warmup_sizes_cannot_be_overruled(pipe):
    fluxfire.optimize(pipe, [])
    with pytest.raises(PlanError, match="instead of height, max_area"):
        fluxfire.warmup(pipe, sizes=[(32, 32)], height=64, max_area=1)
    with pytest.raises(PlanError, match=r"such as \[\(1024, 1024\)\], not \(64, 64\)"):
        fluxfire.warmup(pipe, sizes=(64, 64))


# What notebooks, type checkers and logs see


def test_a_report_and_a_plan_show_in_a_notebook_and_have_a_short_repr(pipe):
    planned = fluxfire.plan(pipe, [QKVFusion()])
    assert repr(planned) == "<Plan of 1 step: ok>"
    assert "<td>qkv-fusion</td>" in planned._repr_html_()
    refused = fluxfire.plan(pipe, ["nothing<b>"])
    assert repr(refused).startswith("<Plan of 0 steps: refused (")
    assert "nothing&lt;b&gt;" in refused._repr_html_()
    assert repr(fluxfire.report(pipe)) == "<Report: no passes; 0 generations>"
    assert "No passes" in fluxfire.report(pipe)._repr_html_()
    fluxfire.optimize(pipe, [QKVFusion()])
    edit(pipe)
    report = fluxfire.report(pipe)
    assert repr(report) == "<Report: qkv-fusion; 1 generation>"
    assert report._repr_html_().count("<table>") == 2


def test_the_name_of_a_class_names_a_pass(pipe):
    fluxfire.optimize(pipe, ["QKVFusion"])
    assert [p.name for p in fluxfire.report(pipe).passes] == ["qkv-fusion"]
    with pytest.raises(PlanError, match="did you mean 'qkv-fusion'"):
        fluxfire.optimize(tiny_kontext(), ["QkvFusion"])


def test_replace_changes_settings(pipe, reference):
    fluxfire.optimize(pipe, [FirstBlockCache(0.1)])
    fluxfire.optimize(pipe, [QKVFusion(vae=False), FirstBlockCache(0)], replace=True)
    assert [p.settings for p in fluxfire.report(pipe).passes] == [
        "QKVFusion(vae=False)",
        "FirstBlockCache(threshold=0)",
    ]
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)
    fluxfire.optimize(pipe, [QKVFusion()], replace=True)  # of a plain pipeline
    assert len(fluxfire.report(pipe).passes) == 1


class Breaks(Bare):
    name = "breaks"

    def apply(self, tx):
        raise RuntimeError("broken")


@pytest.mark.parametrize("wrong", [["nothing"], [Breaks()], "nothing", None])
def test_what_cannot_replace_leaves_the_passes_that_there_were(pipe, wrong):
    fluxfire.optimize(pipe, [FirstBlockCache(0.1)])
    with pytest.raises(FluxfireError):
        fluxfire.optimize(pipe, wrong, replace=True)
    assert [p.settings for p in fluxfire.report(pipe).passes] == ["FirstBlockCache(threshold=0.1)"]


def test_warnings_reach_the_user_at_the_line_that_asked(pipe):
    with pytest.warns(FluxfireWarning, match="float8: float8 is emulated") as seen:
        fluxfire.optimize(pipe, [Float8()])
    assert seen[0].filename == __file__
    fluxfire.restore(pipe)
    with (
        pytest.warns(FluxfireWarning, match="emulated") as seen,
        fluxfire.optimized(pipe, [Float8()]),
    ):
        pass
    assert seen[0].filename == __file__


def test_each_pass_logs_a_line(pipe, caplog):
    with caplog.at_level("INFO", logger="fluxfire"):
        fluxfire.optimize(pipe, [QKVFusion(), FirstBlockCache()])
    assert [record.name for record in caplog.records] == ["fluxfire"] * 2
    assert caplog.messages[0].startswith("qkv-fusion: 9 query-key-value triples fused")


@pytest.mark.parametrize("first_out", ["first", "second"])
def test_using_in_two_threads(pipe, first_out):
    """Each thread runs by its own settings, and in the end nobody's are left."""
    fluxfire.optimize(pipe, [FirstBlockCache(0.1)])
    (live,) = conductor_of(pipe).live
    seen, events = {}, {name: threading.Event() for name in ("entered", "looked", "leave")}

    def other():
        with fluxfire.using(pipe, [FirstBlockCache(0.3)]):
            events["entered"].set()
            events["looked"].wait()
            seen["other"] = live.settings.threshold
            if first_out == "first":
                events["leave"].wait()

    thread = threading.Thread(target=other)
    with fluxfire.using(pipe, [FirstBlockCache(0.2)]):
        thread.start()
        events["entered"].wait()
        seen["own"] = live.settings.threshold
        events["looked"].set()
        if first_out == "second":
            thread.join()
    events["leave"].set()
    thread.join()
    assert seen == {"own": 0.2, "other": 0.3}
    assert live.settings.threshold == 0.1


MISSING = [("vae",), ("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2")]


@pytest.mark.parametrize("missing", MISSING, ids=str)
@pytest.mark.parametrize("pass_", [*own_passes(), MegaCache("cache.bin")], ids=repr)
def test_a_pipeline_that_lacks_components(pass_, missing, tmp_path, monkeypatch):
    """As one that only computes latents from embeddings that were computed elsewhere."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    embeds, pooled, _ = pipe.encode_prompt("a cat", max_sequence_length=8)
    for name in missing:
        setattr(pipe, name, None)

    def latents():
        generator = torch.Generator().manual_seed(0)
        reference = torch.randn(1, pipe.latent_channels, 8, 8, generator=generator)
        return pipe(
            reference, prompt_embeds=embeds, pooled_prompt_embeds=pooled, output_type="latent",
            num_inference_steps=2, height=32, width=32, max_area=1024, generator=generator,
        ).images  # fmt: skip

    plain = latents()
    fluxfire.optimize(pipe, [pass_])
    made = latents()
    bound = {"bitwise": 0.0, "close": 1e-5, "lossy": 0.1}[pass_.exactness]
    assert (made - plain).abs().max() <= bound * plain.abs().max()
    fluxfire.restore(pipe)
    assert torch.equal(latents(), plain)


@pytest.mark.parametrize("pass_", own_passes(), ids=repr)
def test_a_lora_that_was_there_before(pass_):
    """On layers of each kind that passes replace: projections, MLPs, outputs, modulations."""
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    without = edit(pipe, steps=2)
    targets = ["to_q", "to_v", "add_k_proj", "to_out.0", "proj_mlp", "net.2", "linear", "linear_1"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets)
        pipe.transformer.add_adapter(config)
    plain = edit(pipe, steps=2)
    effect = np.abs(plain - without).max()
    fluxfire.optimize(pipe, [pass_])
    made = edit(pipe, steps=2)
    bound = {"bitwise": 0.0, "close": 1e-4, "lossy": 0.6}[pass_.exactness]
    assert np.abs(made - plain).max() <= bound * effect
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe, steps=2), plain)


@pytest.mark.parametrize("pass_", own_passes(), ids=repr)
def test_a_block_that_stands_in_two_places(pass_):
    """As in models that are made deeper by repeating a block."""
    pipe = tiny_kontext(double_blocks=1, single_blocks=2)
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        blocks.append(blocks[0])
    plain = edit(pipe, steps=2)
    fluxfire.optimize(pipe, [pass_])
    made = edit(pipe, steps=2)
    bound = {"bitwise": 0.0, "close": CLOSE, "lossy": 0.05}[pass_.exactness]
    assert np.abs(made - plain).max() <= bound
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe, steps=2), plain)
