"""diffusers' own tests of both Kontext pipelines pass on optimized ones, or are refused by name.

    FLUXFIRE_DIFFUSERS_CHECKOUT=~/diffusers pytest -o addopts= tests/test_upstream.py

They are not part of the installed package, so this needs a checkout of its repository, and the
packages `parameterized` and `requests-mock`. Tokenizers and configurations that those tests fetch
from the hub are replaced by those of the tiny pipeline.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
import sys

import pytest
import torch
import transformers

import fluxfire
from fluxfire import passes
from fluxfire.errors import FluxfireError
from fluxfire.testing import tiny_kontext

CHECKOUT = os.environ.get("FLUXFIRE_DIFFUSERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("needs FLUXFIRE_DIFFUSERS_CHECKOUT", allow_module_level=True)
sys.path.append(CHECKOUT)

TINY = tiny_kontext()
LISTS = {
    "fused-blocks": [passes.FusedBlocks()],
    "float8": [passes.Float8()],
    "qkv-fusion": [passes.QKVFusion()],
    "modulation-table": [passes.ModulationTable()],
    "encoding-cache": [passes.EncodingCache()],
    "reference-cache": [passes.ReferenceCache(0)],
    "first-block-cache": [passes.FirstBlockCache(0)],
    "attention": [passes.Attention("_native_math")],
    "many": [
        passes.QKVFusion(), passes.MemoryLayout(), passes.FusedBlocks(), passes.ModulationTable(),
        passes.EncodingCache(), passes.ReferenceCache(0), passes.FirstBlockCache(0),
    ],
}  # fmt: skip


class FromTheTinyOne:
    """Stands for a class that those tests load from the hub."""

    def __init__(self, make):
        self.make = make

    def from_pretrained(self, name, *_, **__):
        torch.manual_seed(0)
        return self.make(name)

    def __call__(self, config):
        return transformers.T5EncoderModel(config)


def tokenizer(name):
    return copy.deepcopy(TINY.tokenizer if "clip" in name.lower() else TINY.tokenizer_2)


def configuration(_):
    config = copy.deepcopy(TINY.text_encoder_2.config)
    config.d_model, config.d_kv, config.num_heads, config.d_ff = 32, 8, 4, 37
    return config


def upstream(name):
    module = importlib.import_module(f"tests.pipelines.flux.{name}")
    module.AutoTokenizer = module.CLIPTokenizer = FromTheTinyOne(tokenizer)
    module.AutoConfig = FromTheTinyOne(configuration)
    module.T5EncoderModel = FromTheTinyOne(
        lambda name: transformers.T5EncoderModel(configuration(name))
    )
    return next(
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and "Fast" in cls.__name__
    )


def optimized(plain, wanted):
    """Make a pipeline class whose every instance is optimized as soon as it is made."""

    class Optimized(plain):
        @functools.wraps(plain.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            fluxfire.optimize(self, wanted)

    Optimized.__name__ = Optimized.__qualname__ = plain.__name__
    Optimized.__module__ = plain.__module__
    return Optimized


SUITES = {
    "edit": upstream("test_pipeline_flux_kontext"),
    "inpaint": upstream("test_pipeline_flux_kontext_inpaint"),
}
TESTS = [
    (kind, name)
    for kind, suite in SUITES.items()
    for name in dir(suite)
    if name.startswith("test_") and callable(getattr(suite, name))
]


@functools.cache
def plain_fails(kind, name):
    return run(SUITES[kind], name)


def run(suite, name):
    """Run one test; return what it raised, unless it was a skip."""
    case = suite(name)
    case.setUp()
    try:
        getattr(case, name)()
    except BaseException as error:  # noqa: BLE001 - unittest's skip is one, too
        return None if "Skip" in type(error).__name__ else error
    finally:
        case.tearDown()


@pytest.mark.parametrize("wanted", LISTS)
@pytest.mark.parametrize(("kind", "name"), TESTS)
def test_it_passes_or_is_refused_by_name(kind, name, wanted):
    suite = SUITES[kind]
    if (why := plain_fails(kind, name)) is not None:
        pytest.skip(f"fails on the plain pipeline, too: {why}")
    made = type(suite.__name__, (suite,), {})
    made.pipeline_class = optimized(suite.pipeline_class, LISTS[wanted])
    error = run(made, name)
    if error is not None and not isinstance(error, FluxfireError):
        raise error
