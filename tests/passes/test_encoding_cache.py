"""EncodingCache: known again to the last bit, and never after anything changed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import fluxfire
from fluxfire.bench.phases import phases
from fluxfire.passes import EncodingCache
from fluxfire.testing import edit, tiny_kontext

GUIDED = {"negative_prompt": "a boat", "true_cfg_scale": 2.0}


def told(pipe):
    facts = fluxfire.report(pipe).passes[0].facts
    return [facts[f"{of}_{what}"] for of in ("prompts", "pictures") for what in ("hits", "misses")]


@pytest.mark.parametrize("call", [{}, GUIDED, {"num_images_per_prompt": 2}], ids=str)
def test_hits_are_bitwise(kind, call):
    pipe = tiny_kontext(kind)
    plain = edit(pipe, **call)
    fluxfire.optimize(pipe, [EncodingCache()])
    for _ in range(3):
        assert np.array_equal(edit(pipe, **call), plain)
    hits, misses, picture_hits, picture_misses = told(pipe)
    prompts = 2 if call is GUIDED else 1
    assert (hits, misses) == (4 * prompts, 2 * prompts)  # of CLIP and of T5
    masked = kind == "inpaint"  # it encodes the picture without what the mask covers, too
    assert picture_misses == 1 + masked
    assert picture_hits >= 2


def test_one_picture_and_many_prompts(pipe):
    other = tiny_kontext()
    fluxfire.optimize(pipe, [EncodingCache()])
    for prompt in ("make it night", "make it day", "make it night"):
        assert np.array_equal(edit(pipe, prompt=prompt), edit(other, prompt=prompt))
    assert told(pipe) == [2, 4, 2, 1]
    with phases(pipe) as watched:
        edit(pipe)
    assert watched.seconds()["reference encoding"] > 0  # that of looking it up
    assert told(pipe)[2:] == [3, 1]


def test_another_picture_is_another(pipe):
    fluxfire.optimize(pipe, [EncodingCache()])
    for colour in ((1, 2, 3), (1, 2, 4), (1, 2, 3)):
        edit(pipe, image=Image.new("RGB", (32, 32), colour))
    assert told(pipe)[2:] == [1, 2]


def replaced(pipe):
    pipe.text_encoder_2 = copy.deepcopy(pipe.text_encoder_2)
    pipe.vae = copy.deepcopy(pipe.vae)


def edited(pipe):
    """As merging a LoRA does: past the version counter, in the same storage."""
    for module in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        for weight in module.parameters():
            weight.data += 0.01


def cast(pipe):
    pipe.to(torch.bfloat16)


def loaded(pipe):
    for module in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        state = {
            k: v * 1.01 if v.is_floating_point() else v for k, v in module.state_dict().items()
        }
        module.load_state_dict(state)


@pytest.mark.parametrize("change", [replaced, edited, cast, loaded])
def test_what_other_weights_made_does_not_count(pipe, change):
    other = tiny_kontext()
    fluxfire.optimize(pipe, [EncodingCache()])
    edit(pipe)
    change(pipe)
    change(other)
    edit(other)
    assert np.array_equal(edit(pipe), edit(other))
    assert told(pipe)[0] <= 1  # CLIP's, where only T5 was replaced
    assert told(pipe)[2] == 0


def test_a_tokenizer_that_grew(pipe):
    fluxfire.optimize(pipe, [EncodingCache()])
    other = tiny_kontext()
    call = {"prompt": "a <cat-toy> at night"}
    edit(pipe, **call)
    for grown in (pipe, other):
        grown.tokenizer.add_tokens(["<cat-toy>"])
        grown.text_encoder.resize_token_embeddings(len(grown.tokenizer), mean_resizing=False)
        with torch.no_grad():
            grown.text_encoder.get_input_embeddings().weight[-1] = 1
    assert np.array_equal(edit(pipe, **call), edit(other, **call))
    assert told(pipe)[:2] == [1, 3]


def test_the_least_recently_used_goes(pipe):
    fluxfire.optimize(pipe, [EncodingCache(prompts=4, pictures=1)])
    for prompt in ("a", "b", "a", "c", "a"):
        edit(pipe, prompt=prompt, num_inference_steps=1)
    assert told(pipe)[:2] == [4, 6]
    edit(pipe, prompt="b", num_inference_steps=1)
    assert told(pipe)[:2] == [4, 8]
    assert fluxfire.report(pipe).passes[0].facts["prompts_kept"] == 4


def test_with_gradients_nothing_is_kept(pipe):
    fluxfire.optimize(pipe, [EncodingCache()])
    for _ in range(2):
        assert pipe.encode_prompt("a", max_sequence_length=24)[0].requires_grad
    assert told(pipe)[:2] == [0, 0]


@torch.no_grad()
def test_callers_cannot_spoil_what_is_kept(pipe):
    fluxfire.optimize(pipe, [EncodingCache()])
    first = pipe._get_t5_prompt_embeds(prompt=["a"], max_sequence_length=24)
    kept = first.clone()
    first.zero_()
    second = pipe._get_t5_prompt_embeds(prompt=["a"], max_sequence_length=24)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(pipe._get_t5_prompt_embeds(prompt=["a"], max_sequence_length=24), kept)


def test_no_half_entry_after_an_exception(pipe, monkeypatch):
    fluxfire.optimize(pipe, [EncodingCache()])
    plain = type(pipe.vae).encode

    def broken(*_, **__):
        raise MemoryError

    monkeypatch.setattr(type(pipe.vae), "encode", broken)
    with pytest.raises(MemoryError):
        edit(pipe)
    monkeypatch.setattr(type(pipe.vae), "encode", plain)
    assert np.array_equal(edit(pipe), edit(tiny_kontext()))


def test_copies_have_their_own_methods(pipe, reference):
    fluxfire.optimize(pipe, [EncodingCache()])
    edit(pipe)
    before = told(pipe)
    for copied in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert np.array_equal(edit(copied), reference)
    assert told(pipe) == before


def test_given_embeddings_pass_through(pipe):
    embeds, pooled, _ = pipe.encode_prompt("a cat", max_sequence_length=24)
    call = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    plain = edit(pipe, **call)
    fluxfire.optimize(pipe, [EncodingCache()])
    assert np.array_equal(edit(pipe, **call), plain)
    assert told(pipe)[:2] == [0, 0]


def test_settings():
    with pytest.raises(ValueError, match="prompts=-1; it must be a whole number from 0 on"):
        EncodingCache(prompts=-1)
    with pytest.raises(ValueError, match="has nothing to keep"):
        EncodingCache(prompts=0, pictures=0)
