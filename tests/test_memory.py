"""Nothing is kept that is not needed any more."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

import fluxfire
from doubles import Listen, Tally
from fluxfire.passes import EncodingCache, FirstBlockCache, FusedBlocks, QKVFusion
from fluxfire.passes.article.qkv_fusion import FusedProjection
from fluxfire.testing import edit, tiny_kontext
from test_undo import PASSES
from thinned import half, names, thinned


def each_pass(which):
    passes = [*PASSES, FirstBlockCache(10.0)]
    return pytest.mark.parametrize("pass_", half(passes, which), ids=repr)


def test_a_process_that_ends_without_restore_says_nothing():
    script = """
import fluxfire
from fluxfire.passes import Compile
from fluxfire.testing import edit, tiny_kontext
from own_passes import own_passes
lists = [*([p] for p in own_passes()), [Compile()], "faithful"]
kept = [fluxfire.optimize(tiny_kontext(), passes) for passes in lists]
edit(kept[0], steps=1)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    lines = ended.stderr.splitlines()
    assert [x for x in lines if "Exception" in x or "Error" in x or "Traceback" in x] == []


# The report keeps those of the latest hundred runs.
OF_A_RUN = ("RunStatistics", "CompileCounts", "Tokens", "Decision", "Refresh")


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_before():
    """Have Python's collector leave it out: looking through all that torch made takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Numbers must be equal, so a leak shows at once. By hand 50 were tried with every pass.
TIMES = int(os.environ.get("FLUXFIRE_TEST_CYCLES", "3"))


def alive():
    """What there is of tensors, modules, fluxfire's own objects, and classes made for pipelines."""
    Listen.tallies.clear()  # what the test's own pass keeps
    for thing in gc.get_objects():
        if type(thing) is Tally:
            thing.calls.clear()
    del thing  # else it is alive, with all that it holds
    gc.collect()
    found = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.Tensor):
            found["tensors"] += 1
            found["bytes"] += thing.untyped_storage().nbytes()
        elif issubclass(kind, nn.Module):
            found["modules"] += 1
        elif issubclass(kind, type) and "_fluxfire_conductor" in vars(thing):
            found["private classes"] += 1
        elif str(kind.__module__).startswith("fluxfire") and kind.__name__ not in OF_A_RUN:
            found[kind.__qualname__] += 1
    return found


def check_no_growth(run):
    """Run twice, for what is made once a process; then again, and nothing more may be there."""
    run()
    run()
    before = alive()
    for _ in range(TIMES):
        run()
    assert alive() - before == Counter()


@each_pass(0)
def test_cycles_of_optimize_and_restore(pass_):
    pipe = tiny_kontext()

    def cycle():
        fluxfire.optimize(pipe, [pass_])
        edit(pipe, steps=1)
        fluxfire.restore(pipe)

    check_no_growth(cycle)


@each_pass(1)
def test_generations(pass_):
    pipe = fluxfire.optimize(tiny_kontext(), [pass_])
    check_no_growth(lambda: edit(pipe, steps=1))


@pytest.mark.parametrize(
    ("pass_", "restoring"), thinned([*PASSES, FirstBlockCache(10.0)], [True, False], 2), ids=names
)
def test_whole_pipelines_exchanged(pass_, restoring):
    def exchange():
        pipe = fluxfire.optimize(tiny_kontext(), [pass_])
        edit(pipe, steps=1)
        if restoring:
            fluxfire.restore(pipe)

    check_no_growth(exchange)


@each_pass(0)
def test_models_exchanged(pass_):
    pipe = fluxfire.optimize(tiny_kontext(), [pass_])

    def exchange():
        for name in ("text_encoder", "text_encoder_2", "vae"):
            setattr(pipe, name, getattr(tiny_kontext(), name))
            edit(pipe, steps=1)

    check_no_growth(exchange)


@each_pass(1)
def test_weights_exchanged(pass_):
    pipe = fluxfire.optimize(tiny_kontext(), [pass_])

    def exchange():
        weights = tiny_kontext().transformer.state_dict()
        pipe.transformer.load_state_dict(weights, assign=True)
        edit(pipe, steps=1)

    check_no_growth(exchange)


@each_pass(0)
def test_a_restored_pipeline_is_freed_at_once(pass_):
    """As a plain one is: FLUX's weights should not wait for Python to look for circles."""
    pipe = tiny_kontext()
    fluxfire.optimize(pipe, [pass_])
    edit(pipe, steps=1)
    fluxfire.restore(pipe)
    for module in pipe.transformer.modules():  # a circle of diffusers' own since a generation
        vars(module).pop("_diffusers_hook", None)
    del module
    weights = [
        weakref.ref(m.weight) for m in pipe.transformer.modules() if isinstance(m, nn.Linear)
    ]
    models = [weakref.ref(getattr(pipe, name)) for name in ("transformer", "vae", "text_encoder")]
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert [ref for ref in (*models, *weights) if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "vae"])
def test_an_encoder_taken_out_is_freed(name):
    pipe = fluxfire.optimize(tiny_kontext(), [EncodingCache()])
    edit(pipe, steps=1)
    gone = weakref.ref(getattr(pipe, name))
    setattr(pipe, name, None)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("passes", [[QKVFusion()], [QKVFusion(), FusedBlocks()]], ids=repr)
@pytest.mark.parametrize("where", [torch.bfloat16, "meta"], ids=str)
def test_a_cast_or_moved_pipeline_frees_the_fused_weights(passes, where):
    pipe = fluxfire.optimize(tiny_kontext(), passes)
    edit(pipe, steps=1)
    fused = [
        weakref.ref(part.weight)
        for part in pipe.transformer.modules()
        if isinstance(part, FusedProjection)
    ]
    pipe.to(where)
    gc.collect()
    assert fused
    assert [ref() for ref in fused] == [None] * len(fused)
