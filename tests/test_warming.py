"""Which sizes warmup runs, and which it refuses before anything runs."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

import fluxfire
from doubles import Listen
from fluxfire.errors import PlanError
from fluxfire.passes import Compile, FusedBlocks
from fluxfire.supported import model_of
from fluxfire.testing import edit, tiny_kontext

TINY = {"max_sequence_length": 24, "_auto_resize": False}
PAIRS = [(32, 32), (64, 48)]

# Each makes something anew from a list of pairs, because some can be read only once.
ITERABLES = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "keys": dict.fromkeys,
    "counter": Counter,
    "iterator": iter,
    "generator": lambda pairs: (p for p in pairs),
    "zip": lambda pairs: zip(*zip(*pairs, strict=True), strict=True),
    "array": np.array,
    "narrow array": lambda pairs: np.array(pairs, dtype=np.uint8),
    "tensor": torch.tensor,
    "lists": lambda pairs: [list(p) for p in pairs],
    "torch sizes": lambda pairs: [torch.Size(p) for p in pairs],
    "numpy integers": lambda pairs: [tuple(map(np.int64, p)) for p in pairs],
}
# What is no list of sizes, and what the error must name of it.
NO_SIZES = {
    "one size": ((64, 48), "size 64: it must be .*, not (64, 48)"),
    "one size in an array": (np.array([64, 48]), "not array([64, 48])"),
    "a number": (64, "size 64: it must be"),
    "text": ("64x48", "size '64x48': it must be"),
    "bytes": (b"00", "size b'00': it must be"),
    "no text": ("", "size '': it must be"),
    "texts": (["64x48"], "size '64x48': it must be"),
    "pairs of digits": (["64"], "size '64': it must be"),
    "a pair of texts": ([("64", "48")], "size ('64', '48'): it must be"),
    "pairs of bytes": ([b"00"], "size b'00': it must be"),
    "width by height": ({64: 48}, "not {64: 48}"),
    "sides without an order": ([{64, 48}], "it must be (width, height)"),
    "one side": ([(64,)], "size (64,): it must be"),
    "three sides": ([(64, 48, 3)], "size (64, 48, 3): it must be"),
    "floats": ([(64.0, 48.0)], "size (64.0, 48.0): it must be"),
    "float array": (np.array([[64.0, 48.0]]), "it must be (width, height)"),
    "bools": ([(True, True)], "size (True, True): it must be"),
    "numpy bools": (np.array([[True, True]]), "it must be (width, height)"),
    "nothing": ([None], "size None: it must be"),
    "a picture": ([Image.new("RGB", (64, 48))], "it must be (width, height)"),
    "zero": ([(64, 0)], "size (64, 0): it must be"),
    "negative": ([(-64, 48)], "size (-64, 48): it must be"),
    "a bad one behind a good one": ([(64, 48), 7], "size 7: .*, not [(64, 48), 7]"),
    "a scalar array": (np.array(64), "size array(64): it must be"),
    "a spent iterator": (iter(()), "an iterator with no size of .* left in it"),
}


def literal(words):
    """Write a pattern in which only `.*` is special."""
    for special in "()[]{}":
        words = words.replace(special, f"\\{special}")
    return words


@pytest.fixture
def listen():
    return Listen()


@pytest.fixture
def pipe(pipe, listen):
    return fluxfire.optimize(pipe, [listen])


def tokens(listen):
    """Tell the tokens of each generation, which had two steps."""
    return [(c.tokens.noise, c.tokens.reference) for c in listen.tallies[-1].calls[::2]]


@pytest.mark.parametrize("made", ITERABLES.values(), ids=ITERABLES)
def test_warmup_runs_sizes_and_references_from_any_iterable(pipe, listen, made):
    fluxfire.warmup(pipe, sizes=made(PAIRS), references=made(PAIRS), **TINY)
    assert sorted(tokens(listen)) == [(64, 64), (64, 192), (192, 64), (192, 192)]


@pytest.mark.parametrize("role", ["sizes", "references"])
@pytest.mark.parametrize(("given", "named"), NO_SIZES.values(), ids=NO_SIZES)
def test_warmup_refuses_what_are_no_sizes(pipe, given, named, role):
    with pytest.raises(PlanError, match=literal(named)):
        fluxfire.warmup(pipe, **{"sizes": PAIRS, role: given}, **TINY)
    assert fluxfire.report(pipe).runs == ()


@pytest.mark.parametrize("nothing", [[], (), {}, np.zeros((0, 2), dtype=int), iter(())])
def test_warmup_needs_an_output_size(pipe, nothing):
    with pytest.raises(PlanError, match="no size of an output"):
        fluxfire.warmup(pipe, sizes=nothing, **TINY)


@pytest.mark.parametrize("nothing", [[], (), {}, np.zeros((0, 2), dtype=int)])
def test_warmup_without_references_is_text_to_image_only(pipe, listen, nothing):
    fluxfire.warmup(pipe, sizes=PAIRS, references=nothing, max_sequence_length=24)
    assert tokens(listen) == [(64, 0), (192, 0)]


def test_warmup_reads_an_iterator_once(pipe):
    pairs = iter(PAIRS)
    with pytest.raises(PlanError, match="no size of a reference left .* so give a list"):
        fluxfire.warmup(pipe, sizes=pairs, references=pairs, **TINY)


def test_warmup_tells_what_an_iterator_held(pipe):
    with pytest.raises(PlanError, match=literal("size 64: .*, not [64, 48]")):
        fluxfire.warmup(pipe, sizes=iter((64, 48)), **TINY)


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_warmup_lets_through_what_a_generator_raises(pipe, error):
    def broken():
        yield 32, 32
        raise error("of the user's own")

    with pytest.raises(error, match="of the user's own"):
        fluxfire.warmup(pipe, sizes=broken(), **TINY)


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3)])
@pytest.mark.parametrize("resize", [False, True])
def test_warmup_refuses_references_too_small_for_the_pipeline(pipe, size, resize):
    with pytest.raises(PlanError, match="both whole numbers of 4 or more$"):
        fluxfire.warmup(pipe, PAIRS, [size], **TINY | {"_auto_resize": resize})
    assert fluxfire.report(pipe).runs == ()


# The pipeline takes (47, 32) for (44, 32), whose shape is nearest to (64, 48), not to (48, 32).
@pytest.mark.parametrize("size", [(4, 4), (7, 400), (400, 7), (47, 32), (33, 63), (64, 41)])
@pytest.mark.parametrize("resize", [False, True])
def test_warmup_resizes_references_as_the_pipeline_does(monkeypatch, pipe, listen, size, resize):
    preferred = [(16, 64), (32, 48), (32, 32), (64, 48), (48, 32), (64, 16)]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", preferred)
    call = TINY | {"_auto_resize": resize, "num_inference_steps": 2}
    fluxfire.warmup(pipe, [(32, 32)], [size], **call)
    pipe(Image.new("RGB", size), "", height=32, width=32, max_area=1024, **call)
    warmed, real = tokens(listen)
    assert warmed == real
    if resize:
        width, height = model_of(pipe).reference_size(pipe, *size)
        assert real[1] == width * height // 16  # a token of the tiny pipeline covers 4 x 4 pixels


def test_warmup_refuses_references_beside_a_picture(pipe):
    with pytest.raises(PlanError, match=r"not use references=\[\(32, 32\)\] beside image;"):
        fluxfire.warmup(pipe, PAIRS, [(32, 32)], image=Image.new("RGB", (32, 32)), **TINY)


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_warmup_refuses_a_picture_that_would_overrule_the_sizes(name):
    pipe = fluxfire.optimize(tiny_kontext("inpaint"), [])
    with pytest.raises(PlanError, match=f"leave out {name}$"):
        fluxfire.warmup(pipe, PAIRS, **{name: Image.new("RGB", (32, 32))}, **TINY)
    assert fluxfire.report(pipe).runs == ()


def test_warmup_of_an_inpainting_pipeline_runs_each_reference(listen):
    pipe = fluxfire.optimize(tiny_kontext("inpaint"), [listen])
    fluxfire.warmup(pipe, iter(PAIRS), np.array([(32, 32), (401, 7)]), **TINY)
    assert tokens(listen) == [(64, 64), (64, 100), (192, 64), (192, 100)]


def shapes(listen):
    """Tell the pictures, text tokens and noise tokens of each generation, which had two steps."""
    return [(len(c.timestep), c.tokens.text, c.tokens.noise) for c in listen.tallies[-1].calls[::2]]


def test_warmup_runs_each_size_with_each_batch_and_text(pipe, listen):
    fluxfire.warmup(
        pipe, sizes=PAIRS, batch=iter((1, 3, 1)), text=np.array([8, 24]), _auto_resize=False
    )
    made = shapes(listen)
    assert sorted(made) == sorted(product((1, 3), (8, 24), (64, 192)))
    # The second shape differs from the first in all but the number of pictures, which rises last.
    assert made[:2] == [(1, 8, 64), (1, 24, 192)]
    assert [n for n, _, _ in made] == [1] * 4 + [3] * 4


@pytest.mark.parametrize("kind", ["edit", "inpaint"])
def test_one_number_is_one_number(kind, listen):
    pipe = fluxfire.optimize(tiny_kontext(kind), [listen])
    fluxfire.warmup(pipe, sizes=[(32, 32)], batch=2, text=16, _auto_resize=False)
    assert {shape[:2] for shape in shapes(listen)} == {(2, 16)}


NO_COUNTS = {
    "none": ({"batch": ()}, "found nothing in batch=()"),
    "zero": ({"batch": (1, 0)}, "cannot use 0 in batch=(1, 0): .* each a whole number, 1 or more"),
    "a float": ({"batch": [1.5]}, "cannot use 1.5 in batch=[1.5]"),
    "a bool": ({"text": [True]}, "cannot use True in text=[True]"),
    "words": ({"text": "512"}, "cannot use '512' in text='512'"),
    "too long": ({"text": (128, 513)}, "cannot use 513 in text=(128, 513): .* from 1 to 512"),
    "numbers twice": ({"batch": 2, "num_images_per_prompt": 2}, "instead of num_images_per_"),
    "latents": ({"batch": 2, "latents": None}, "instead of latents"),
    "a generator each": ({"batch": 2, "generator": [None]}, "instead of generator"),
    "negative prompts": ({"batch": 2, "negative_prompt": ["a", "b"]}, "instead of negative_prompt"),
    "a mapping": ({"batch": {1: 2}}, "cannot use {1: 2} in batch"),
    "encoded negative": ({"text": 8, "negative_prompt_embeds": 0}, "instead of negative_prompt_em"),
    "several prompts": ({"batch": 2, "prompt": ["a", "b"]}, "batch=(1, 4) instead of prompt;"),
    "lengths twice": ({"text": 8, "max_sequence_length": 8}, "instead of max_sequence_length"),
    "encoded": ({"text": 8, "prompt_embeds": torch.zeros(1, 8, 40)}, "instead of prompt_embeds"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "named"), NO_COUNTS.values(), ids=NO_COUNTS)
def test_warmup_refuses_what_are_no_numbers_of_pictures_or_tokens(pipe, given, named):
    with pytest.raises(PlanError, match=literal(named)):
        fluxfire.warmup(pipe, sizes=PAIRS, _auto_resize=False, **given)
    assert fluxfire.report(pipe).runs == ()


@pytest.mark.slow
def test_after_warmup_no_batch_and_no_text_compiles():
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    fluxfire.optimize(pipe, [FusedBlocks(), Compile()])
    fluxfire.warmup(pipe, [(32, 32), (64, 48)], batch=(1, 4), text=(16, 24), _auto_resize=False)
    warm = [run.compiles for run in fluxfire.report(pipe).runs]
    assert warm == [2, 2, 0, 0, 2, 0, 0, 0]  # the first shape; any size and text; several pictures
    guided = {"negative_prompt": "blurry", "true_cfg_scale": 2.0}
    for batch, text, size, more in (
        (3, 24, (32, 32), {}),
        (4, 20, (48, 32), guided),
        (2, 16, (64, 64), {}),
        (1, 21, (48, 48), guided),
        (1, 17, (32, 48), {}),
    ):
        call = {"num_images_per_prompt": batch, "max_sequence_length": text, **more}
        edit(pipe, size, steps=1, **call)
    assert [run.compiles for run in fluxfire.report(pipe).runs[len(warm) :]] == [0] * 5
