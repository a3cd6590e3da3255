"""Copies and relatives of an optimized pipeline are plain, and none of them touches another."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
)
from torch import nn

import fluxfire
from doubles import Bare, ScaleTemb
from fluxfire import Change, modules
from fluxfire.edits.stand_in import StandIn
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.kontext import KONTEXT
from fluxfire.passes import (
    Attention,
    EncodingCache,
    FirstBlockCache,
    Float8,
    FusedBlocks,
    MemoryLayout,
    QKVFusion,
)
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from test_undo import PASSES
from thinned import half, names, thinned

ALL = [*PASSES, FirstBlockCache(10.0), Float8("drop")]


def each_pass(which):
    return pytest.mark.parametrize("pass_", half(ALL, which), ids=repr)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


DEEP = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "copy of a copy": lambda thing: copy.deepcopy(copy.deepcopy(thing)),
    "pickled copy": lambda thing: pickled(copy.deepcopy(thing)),
}
TWICE = [QKVFusion(), Float8(), FusedBlocks(), ScaleTemb()]
DEEP_CASES = [
    pytest.param(pass_, way, id=f"{way}-{pass_!r}")
    for way, pass_ in (
        *thinned(["deepcopy", "pickle"], ALL, 2),
        *thinned(["copy of a copy", "pickled copy"], TWICE, 1),
    )
]


def structure(pipe):
    """A fingerprint that copies have in common: of objects the class, not the identity."""
    facts = {}
    for key, value in fingerprint(pipe).items():
        is_object = ": attribute " in key and isinstance(value, tuple) and len(value) == 2
        facts[key] = value[0] if is_object and isinstance(value[1], int) else value
    for name, component in modules.components(pipe):
        for where, module in component.named_modules():
            for key, value in vars(module).items():
                if hasattr(value, "__dict__") and not isinstance(value, type):
                    facts[f"{name}.{where} {key}"] = type(value), tuple(vars(value))
    return facts


def heard(pipe):
    """The modules that a generation calls, as forward hooks hear of them."""
    names, handles = set(), []
    for component_name, component in modules.components(pipe):
        for name, module in component.named_modules():
            said = f"{component_name}.{name}"
            handles += [
                module.register_forward_hook(lambda *_, said=said: names.add(said)),
                module.register_forward_pre_hook(lambda *_, said=said: names.add(f"pre {said}")),
            ]
    edit(pipe, steps=1)
    for handle in handles:
        handle.remove()
    return names


@pytest.fixture(scope="module")
def plain():
    """What plain pipelines do, by name."""
    pipe = tiny_kontext()
    facts = {"picture": edit(pipe, steps=1), "pictures": edit(tiny_kontext())}
    for name, duplicate in DEEP.items():
        facts[name] = structure(duplicate(pipe))
    facts["heard"] = heard(copy.deepcopy(pipe))
    facts["cast"] = edit(copy.deepcopy(pipe).to(torch.bfloat16), steps=1)
    return facts


def optimized(pass_, *, used=True):
    pipe = tiny_kontext()
    edit(pipe, steps=1)
    fluxfire.optimize(pipe, [pass_])
    return pipe, edit(pipe, steps=1) if used else None


def drops(pass_):
    return getattr(pass_, "originals", None) == "drop"


@pytest.mark.parametrize(("pass_", "way"), DEEP_CASES)
def test_deep_copies_are_plain(plain, pass_, way):
    pipe, picture = optimized(pass_, used=not drops(pass_))
    twin = DEEP[way](pipe)
    assert differences(plain[way], structure(twin)) == []
    assert np.array_equal(edit(twin, steps=1), plain["picture"])
    assert fluxfire.report(twin) == fluxfire.report(tiny_kontext())
    # Neither touches the other.
    fluxfire.restore(twin)
    assert [p.name for p in fluxfire.report(pipe).passes] == [pass_.name]
    if picture is not None:
        assert np.array_equal(edit(pipe, steps=1), picture)
        fluxfire.optimize(twin, [pass_])
        assert np.array_equal(edit(twin, steps=1), picture)
        fluxfire.restore(pipe)
        assert np.array_equal(edit(twin, steps=1), picture)
        assert np.array_equal(edit(pipe, steps=1), plain["picture"])
        before = structure(twin)
        fluxfire.optimize(pipe, [pass_])
        assert differences(before, structure(twin)) == []
        fluxfire.restore(twin)
        assert np.array_equal(edit(pipe, steps=1), picture)
        assert np.array_equal(edit(twin, steps=1), plain["picture"])


@each_pass(0)
def test_deep_copies_are_heard_cast_and_offloaded(plain, pass_):
    pipe, _ = optimized(pass_, used=not drops(pass_))
    twin = copy.deepcopy(pipe)
    assert heard(twin) == plain["heard"]
    accelerate.cpu_offload(twin.transformer, torch.device("cpu"))
    assert np.array_equal(edit(twin, steps=1), plain["picture"])
    assert np.array_equal(edit(pickled(pipe).to(torch.bfloat16), steps=1), plain["cast"])


@each_pass(1)
def test_deep_copies_made_while_a_picture_is(plain, pass_):
    pipe, _ = optimized(pass_, used=False)
    twins = []

    def duplicate(pipe, *_):
        twins.extend([copy.deepcopy(pipe), pickled(pipe), copy.copy(pipe)])
        return {}

    if drops(pass_):
        with pytest.raises(FluxfireError, match="a copy would be of the plain pipeline"):
            edit(pipe, steps=1, callback_on_step_end=duplicate)
        return
    picture = edit(pipe, steps=1)
    assert np.array_equal(edit(pipe, steps=1, callback_on_step_end=duplicate), picture)
    shallow = twins.pop()
    for twin in twins:
        assert np.array_equal(edit(twin, steps=1), plain["picture"])
        assert np.array_equal(edit(twin), plain["pictures"])
    assert fluxfire.report(shallow).passes == ()
    assert np.isfinite(edit(shallow, steps=1)).all()
    fluxfire.restore(pipe)
    assert np.array_equal(edit(shallow, steps=1), plain["picture"])


@pytest.mark.parametrize(
    ("pass_", "duplicate"), thinned(ALL, [copy.deepcopy, DEEP["pickled copy"]], 2), ids=names
)
def test_deep_copies_of_one_model(plain, pass_, duplicate):
    pipe, picture = optimized(pass_, used=not drops(pass_))
    other = tiny_kontext()
    edit(other, steps=1)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        setattr(other, name, duplicate(getattr(pipe, name)))
    assert np.array_equal(edit(other, steps=1), plain["picture"])
    assert differences(plain["deepcopy"], structure(other)) == []
    assert heard(other) == plain["heard"]
    other.to(torch.bfloat16)
    assert np.array_equal(edit(other, steps=1), plain["cast"])
    if picture is not None:
        assert np.array_equal(edit(pipe, steps=1), picture)
        fluxfire.restore(pipe)
        assert np.array_equal(edit(pipe, steps=1), plain["picture"])


def test_no_copy_of_what_was_let_go():
    pipe, _ = optimized(Float8("drop"))
    for way in DEEP.values():
        for thing in (pipe, pipe.transformer):
            with pytest.raises(FluxfireError, match="Load the pipeline again"):
                way(thing)


def test_a_copy_of_two_models_at_once(plain):
    """Each undoes the edits of the whole pipeline, and neither those of the other's copy twice."""
    for pass_ in (QKVFusion(), MemoryLayout(), Float8(), Attention("fa3-fp8"), ScaleTemb()):
        pipe, _ = optimized(pass_)
        other = tiny_kontext()
        edit(other, steps=1)
        for name, twin in copy.deepcopy(
            {name: getattr(pipe, name) for name in ("vae", "transformer", "text_encoder")}
        ).items():
            setattr(other, name, twin)
        assert differences(plain["deepcopy"], structure(other)) == []
        assert np.array_equal(edit(other, steps=1), plain["picture"])


class Counted(nn.Module):
    """Says how often it was copied."""

    copies = 0

    def __deepcopy__(self, memo):
        Counted.copies += 1
        return Counted()


@pytest.mark.parametrize("pass_", [QKVFusion(), Float8(), Attention("fa3-fp8"), MemoryLayout()])
def test_a_copy_of_one_model_copies_no_other(pass_):
    """FLUX's transformer has 22 GiB, which a copy of its VAE does not need."""
    pipe, _ = optimized(pass_)
    for owner in (pipe.transformer, pipe.vae, pipe.text_encoder):
        owner.counted = Counted()
    for attention in KONTEXT.attentions(pipe.transformer):
        attention.counted = attention.to_q.counted = Counted()
    Counted.copies = 0
    copy.deepcopy(pipe.text_encoder_2)
    assert Counted.copies == 0
    copy.deepcopy(pipe.text_encoder)
    assert Counted.copies == 1


OUTSIDE = []


@dataclass(frozen=True, kw_only=True)
class ManyInverses(Bare):
    """Undoes in each way that Python has of binding a call to something."""

    name: ClassVar[str] = "many-inverses"
    exactness: ClassVar[str] = "lossy"

    def apply(self, tx):
        def recorded(name, owner, inverse):
            tx.on_undo(inverse)
            setattr(owner, name, "made")

        transformer, vae = tx.pipe.transformer, tx.pipe.vae

        def forget(owner, name):
            vars(owner).pop(name, None)

        def held():
            forget(transformer, "held")

        def many(times=1):
            if times:
                many(times - 1)
            else:
                forget(vae, "many")

        holder = Holder(transformer)
        recorded("closure", transformer, lambda: forget(transformer, "closure"))
        recorded("held", transformer, lambda: held())  # noqa: PLW0108 - a closure in a closure
        recorded("many", vae, many)
        recorded("bound", transformer, holder.forget)
        recorded("by_default", vae, lambda vae=vae: forget(vae, "by_default"))
        recorded("by_name", vae, lambda *, vae=vae: forget(vae, "by_name"))
        recorded("by_partial", vae, partial(forget, vae, name="by_partial"))
        recorded("of_closure", vae, partial(lambda: forget(vae, "of_closure")))
        recorded("by_pipe", vae, lambda: forget(tx.pipe.vae, "by_pipe"))
        recorded("of_pipe", tx.pipe, lambda: forget(tx.pipe, "of_pipe"))

        def both():
            forget(vae, "both")
            forget(transformer, "both")

        vae.both = transformer.both = "made"
        tx.on_undo(both)
        tx.on_undo(OUTSIDE.clear)
        OUTSIDE.append(1)
        return Change(12, "attributes set")


class Holder:
    def __init__(self, owner):
        self.owner = owner

    def forget(self):
        vars(self.owner).pop("bound", None)


def test_inverses_of_all_kinds_are_undone_on_the_copy_alone(plain):
    pipe = tiny_kontext()
    edit(pipe, steps=1)
    was = fingerprint(pipe)
    fluxfire.optimize(pipe, [ManyInverses()])
    before = fingerprint(pipe)
    other = tiny_kontext()
    edit(other, steps=1)
    for name in ("transformer", "vae", "text_encoder"):
        setattr(other, name, copy.deepcopy(getattr(pipe, name)))
        assert differences(before, fingerprint(pipe)) == []
        assert OUTSIDE == [1]
    assert differences(plain["deepcopy"], structure(other)) == []
    for way, duplicate in DEEP.items():
        assert differences(plain[way], structure(duplicate(pipe))) == []
        assert differences(before, fingerprint(pipe)) == []
        assert OUTSIDE == [1]
    fluxfire.restore(pipe)
    assert differences(was, fingerprint(pipe)) == []
    assert OUTSIDE == []


# What these change, whoever runs the models has.
OF_THE_MODEL = ("float8", "int8", "int8-text-encoder", "attention", "scale-temb")
OF_AN_ENCODER = ("int8-text-encoder", "placement")
CLOSE = 1e-5
RELATIVES = {
    "copy": copy.copy,
    "type": lambda pipe: type(pipe)(**pipe.components),
    "class": lambda pipe: pipe.__class__(**pipe.components),
    "from_pipe of the class": FluxKontextPipeline.from_pipe,
    "from_pipe of the pipeline": lambda pipe: pipe.from_pipe(pipe),
    "from_pipe of its type": lambda pipe: type(pipe).from_pipe(pipe),
    "inpainting": FluxKontextInpaintPipeline.from_pipe,
}
ALIKE = ["class", "from_pipe of the class", "from_pipe of its type"]  # as another one of them
CASES = [
    pytest.param(pass_, RELATIVES[name], id=f"{name}-{pass_!r}")
    for name, pass_ in (
        *thinned([name for name in RELATIVES if name not in ALIKE], ALL, 3),
        *thinned(ALIKE, [FusedBlocks(), EncodingCache()], 1),
    )
]


@pytest.mark.parametrize(("pass_", "relate"), CASES)
def test_pipelines_that_share_the_models(pass_, relate):
    pipe = tiny_kontext()
    picture, alone, names = edit(pipe), edit(relate(pipe)), list(vars(relate(pipe)))
    fluxfire.optimize(pipe, [pass_])
    changed = edit(pipe)
    relative = relate(pipe)
    assert type(relative) in KONTEXT.pipelines
    assert list(vars(relative)) == names
    assert fluxfire.report(relative).passes == ()
    if pass_.exactness == "lossy" and pass_.name in OF_THE_MODEL:
        made = edit(relative)
        assert relate is RELATIVES["inpainting"] or np.array_equal(made, changed)
    else:
        assert np.abs(edit(relative) - alone).max() < CLOSE
    assert fluxfire.restore(relative) is relative
    assert [p.name for p in fluxfire.report(pipe).passes] == [pass_.name]
    assert np.array_equal(edit(pipe), changed)
    dropped = "|the meta device" if drops(pass_) else ""
    with pytest.raises(PlanError, match="already optimized through another pipeline" + dropped):
        fluxfire.optimize(relative, [pass_])
    if drops(pass_):
        return
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), picture)
    assert np.array_equal(edit(relative), alone)
    fluxfire.optimize(relative, [pass_])
    with pytest.raises(PlanError, match="already optimized through another pipeline"):
        fluxfire.optimize(pipe, [pass_])
    assert fluxfire.report(pipe).passes == ()
    fluxfire.restore(relative)
    assert np.array_equal(edit(pipe), picture)
    assert np.array_equal(edit(relative), alone)


def own_parts():
    """Another of each part that a request may bring along: it changes the picture."""
    other = tiny_kontext(seed=1)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder": other.text_encoder,
        "text_encoder_2": other.text_encoder_2,
        "vae": other.vae,
        "tokenizer": Wrapped(other.tokenizer),
    }


class Wrapped:
    """A tokenizer that reads something else."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, 0

    def __call__(self, prompt, **settings):
        self.asked += 1
        return self.tokenizer(["another prompt"] * len(prompt), **settings)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize(
    ("pass_", "relate"),
    thinned(ALL, [copy.copy, RELATIVES["from_pipe of the pipeline"]], 2),
    ids=names,
)
def test_pipelines_that_share_models_keep_their_own_parts(pass_, relate):
    pipe = tiny_kontext()
    picture, wanted = edit(pipe), {}
    for name, part in own_parts().items():
        relative = relate(pipe)
        setattr(relative, name, part)
        wanted[name] = edit(relative)
        assert np.abs(wanted[name] - picture).max() > 1e-3, name
    fluxfire.optimize(pipe, [pass_])
    changed = edit(pipe)
    for name, part in own_parts().items():
        relative = relate(pipe)
        setattr(relative, name, part)
        kept = getattr(pipe, name)
        made = edit(relative)
        if pass_.exactness != "lossy" or pass_.name not in OF_THE_MODEL:
            assert np.abs(made - wanted[name]).max() < CLOSE, name
        assert np.abs(made - changed).max() > 1e-3, name
        assert getattr(relative, name) is part
        assert getattr(pipe, name) is kept
        assert name != "tokenizer" or part.asked
        assert np.array_equal(edit(pipe), changed), name
    if not drops(pass_):
        fluxfire.restore(pipe)
        assert np.array_equal(edit(pipe), picture)
        assert np.array_equal(edit(relative), wanted[name])


@each_pass(0)
def test_a_pipeline_loaded_through_an_optimized_one(pass_, tmp_path):
    """All pipelines come from the file: on some CPUs a product depends on where its weights lie."""
    tiny_kontext().save_pretrained(tmp_path)
    pipe = FluxKontextPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    picture = edit(pipe, steps=1)
    fluxfire.optimize(pipe, [pass_])
    changed = edit(pipe, steps=1)
    for cls in (type(pipe), pipe.__class__, pipe):
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is FluxKontextPipeline
        assert fluxfire.report(loaded).passes == ()
        assert np.array_equal(edit(loaded, steps=1), picture)
        fluxfire.restore(loaded)
        assert np.array_equal(edit(pipe, steps=1), changed)
    fluxfire.optimize(loaded, [pass_])
    assert np.array_equal(edit(loaded, steps=1), changed)


@pytest.mark.parametrize(("pass_", "first"), thinned(ALL, [0, 1], 2), ids=names)
def test_two_optimized_pipelines_that_share_encoders_and_vae(pass_, first):
    one, two = pipes = tiny_kontext(), tiny_kontext(seed=1)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        setattr(two, name, getattr(one, name))
    pictures = [edit(pipe) for pipe in pipes]
    before = [fingerprint(pipe) for pipe in pipes]
    fluxfire.optimize(one, [pass_])
    if pass_.name in OF_AN_ENCODER:
        with pytest.raises(PlanError, match="another pipeline that shares the .* restore"):
            fluxfire.optimize(two, [pass_])
        fluxfire.restore(one)
        assert all(map(np.array_equal, map(edit, pipes), pictures))
        return
    fluxfire.optimize(two, [pass_])
    changed = [edit(pipe) for pipe in pipes]
    twins = [] if drops(pass_) else [copy.deepcopy(pipe) for pipe in pipes]
    for twin, picture in zip(twins, pictures, strict=False):
        assert np.array_equal(edit(twin), picture)
        assert set(vars(twin.vae)) == set(vars(tiny_kontext().vae))
    if drops(pass_):
        return
    fluxfire.restore(pipes[first])
    assert np.abs(edit(pipes[first]) - pictures[first]).max() < CLOSE
    assert np.abs(edit(pipes[1 - first]) - changed[1 - first]).max() < CLOSE
    fluxfire.restore(pipes[1 - first])
    for pipe, was, picture in zip(pipes, before, pictures, strict=True):
        assert differences(was, fingerprint(pipe)) == []
        assert np.array_equal(edit(pipe), picture)
    fluxfire.optimize(one, [pass_])
    assert np.array_equal(edit(one), changed[0])


def test_two_pipelines_over_one_transformer_with_their_own_vae(plain):
    one, two = tiny_kontext(), tiny_kontext()
    two.transformer = one.transformer
    fluxfire.optimize(one, [QKVFusion(), EncodingCache()])
    edit(one)
    before = fingerprint(one)
    assert np.abs(edit(two) - plain["pictures"]).max() < CLOSE
    with pytest.raises(PlanError, match="already optimized through another pipeline"):
        fluxfire.optimize(two, [])
    fluxfire.restore(two)
    assert differences(before, fingerprint(one)) == []
    fluxfire.restore(one)
    assert np.array_equal(edit(two), plain["pictures"])
    fluxfire.optimize(two, [FirstBlockCache()])
    fluxfire.restore(two)
    assert np.array_equal(edit(one), plain["pictures"])


@each_pass(1)
def test_a_deep_copy_of_a_shallow_one_is_plain(plain, pass_):
    pipe, picture = optimized(pass_, used=not drops(pass_))
    for relate in (copy.copy, RELATIVES["from_pipe of the pipeline"]):
        twin = copy.deepcopy(relate(pipe))
        assert np.array_equal(edit(twin, steps=1), plain["picture"])
        assert heard(twin) == plain["heard"]
        assert picture is None or np.array_equal(edit(pipe, steps=1), picture)


@each_pass(0)
def test_a_model_outlives_its_pipeline(plain, pass_):
    """Its copies are plain also then."""
    pipe, _ = optimized(pass_, used=not drops(pass_))
    kept = {name: getattr(pipe, name) for name in ("transformer", "vae", "text_encoder")}
    del pipe
    gc.collect()
    for duplicate in (copy.deepcopy, pickled):
        other = tiny_kontext()
        edit(other, steps=1)
        for name, model in kept.items():
            setattr(other, name, duplicate(model))
        assert differences(plain["deepcopy"], structure(other)) == []
        assert np.array_equal(edit(other, steps=1), plain["picture"])


@pytest.mark.parametrize("name", ["__call__", "forward"])
def test_a_stand_in_names_the_arguments_of_what_it_stands_in_for(name):
    """`Attention.forward` drops whatever it does not find in a processor's signature."""
    import fluxfire.passes  # noqa: F401 - so that all of them are known

    def known(cls):
        return [cls, *(below for sub in cls.__subclasses__() for below in known(sub))]

    checked = 0
    for ours in known(StandIn):
        plain = next(c for c in ours.__mro__ if not issubclass(c, StandIn))
        if name not in vars(ours) or plain in {object, nn.Module}:
            continue
        ours_names = list(inspect.signature(getattr(ours, name)).parameters)
        asked = inspect.signature(getattr(plain, name)).parameters.values()
        named = [p.name for p in asked if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert ours_names[: len(named)] == named, ours
        checked += 1
    assert checked


@pytest.mark.parametrize("pass_", [Float8(), QKVFusion()], ids=repr)
def test_a_pipeline_that_gets_another_class_stays_optimized(pass_):
    class Mine(FluxKontextPipeline):
        mine = 1

    plain, pipe = tiny_kontext(), tiny_kontext()
    fluxfire.optimize(pipe, [pass_])
    pipe.__class__ = Mine
    assert pipe.__class__ is Mine
    assert pipe.mine
    assert len(fluxfire.report(pipe).passes) == 1
    assert type(copy.deepcopy(pipe)) is Mine
    edit(pipe)
    assert len(fluxfire.report(pipe).runs) == 1
    fluxfire.restore(pipe)
    assert type(pipe) is Mine
    assert np.array_equal(edit(pipe), edit(plain))


@pytest.mark.parametrize(
    "pass_", [Float8(), QKVFusion(), FusedBlocks(), Attention("fa3-fp8")], ids=repr
)
def test_a_copied_block_is_plain(pass_):
    plain, pipe = tiny_kontext(), tiny_kontext()
    fluxfire.optimize(pipe, [pass_])
    edit(pipe)
    for each in (plain, pipe):
        for blocks in (
            each.transformer.transformer_blocks,
            each.transformer.single_transformer_blocks,
        ):
            blocks.append(copy.deepcopy(blocks[0]))
            for weight in blocks[-1].parameters():
                weight.data.mul_(1.7)
    expected = edit(plain)
    assert np.abs(edit(pipe) - expected).max() < 0.01
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), expected)
    fluxfire.optimize(pipe, [pass_])


@pytest.mark.parametrize("other", PASSES, ids=repr)
def test_copies_of_pipelines_with_fused_blocks_and_another_pass(other):
    """What one pass remembers of the modules must not drag the other's tensors into the copy."""
    passes = [p for p in (other, FusedBlocks()) if p.name != other.name or p is other]
    if not fluxfire.plan(tiny_kontext(), passes).ok:
        passes.reverse()
    pipe = tiny_kontext()
    expected = edit(pipe, steps=1)
    fluxfire.optimize(pipe, passes)
    pipe.transformer.transformer_blocks[0].lock = lock = threading.Lock()
    edit(pipe, steps=1)
    copy.deepcopy(pipe.vae)
    del pipe.transformer.transformer_blocks[0].lock, lock
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert np.array_equal(edit(twin, steps=1), expected)
    assert not any(weight.requires_grad and weight.grad_fn for weight in tensors_of(pipe))


def tensors_of(pipe):
    for module in pipe.transformer.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def test_a_pipeline_that_took_the_place_of_the_optimized_one():
    pipe = tiny_kontext()
    expected = edit(FluxKontextInpaintPipeline(**tiny_kontext().components), steps=1)
    fluxfire.optimize(pipe, [QKVFusion(), FusedBlocks()])
    edit(pipe, steps=1)
    pipe = FluxKontextInpaintPipeline.from_pipe(pipe)
    gc.collect()
    with pytest.raises(PlanError, match=r"call restore\(pipe, shared=True\)"):
        fluxfire.optimize(pipe, [FusedBlocks()])
    assert fluxfire.restore(pipe) is fluxfire.restore(pipe, shared=True) is pipe
    assert np.array_equal(edit(pipe, steps=1), expected)
    fluxfire.optimize(pipe, [FusedBlocks()])
    assert np.abs(edit(pipe, steps=1) - expected).max() < 1e-5
