"""EncodingCache: bitwise the same results, and no cached result after any change."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fluxfire
from fluxfire.bench.phases import phases
from fluxfire.passes import EncodingCache, MemoryLayout, QKVFusion, encoding_cache
from fluxfire.passes.encoding_cache import _ResultCache
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
    assert (hits, misses) == (4 * prompts, 2 * prompts)  # one of CLIP, one of T5
    masked = kind == "inpaint"  # it also encodes the picture without the masked region
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
    assert watched.seconds()["reference encoding"] > 0  # the lookup itself
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
    """Change a weight as merging a LoRA does: same storage, version counter unchanged."""
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
    assert told(pipe)[0] <= 1  # CLIP's results stay, since only T5 was replaced
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


def conv(pipe):
    return pipe.vae.encoder.conv_in


def clip(pipe):
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder)


def token(pipe, place):
    return pipe.tokenizer("make it night").input_ids[place]


def embeddings_swapped(pipe):
    numbers = pipe.text_encoder.get_input_embeddings().weight.data
    numbers[[token(pipe, 1), token(pipe, 2)]] = numbers[[token(pipe, 2), token(pipe, 1)]]


def one_embedding(pipe):
    word = pipe.tokenizer_2("make it night").input_ids[0]
    pipe.text_encoder_2.shared.weight.data[word] += 1


def one_channel(pipe):
    conv(pipe).weight.data[3] += 0.5


def one_channel_in(pipe):
    pipe.vae.encoder.down_blocks[0].resnets[0].conv1.weight.data[:, 3] += 0.5


def one_bias(pipe):
    pipe.vae.encoder.conv_out.bias.data[0] += 0.3


def a_little(pipe):
    with torch.no_grad():
        conv(pipe).weight.mul_(1.05)


def attention_bias(pipe):
    attention = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_bias.weight.data[1] += 3


def buffer(pipe):
    places = next(b for n, b in pipe.text_encoder.named_buffers() if n.endswith("position_ids"))
    places.copy_(places.flip(-1))


def tiles(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8


def overlap(pipe):
    tiles(pipe)
    pipe.vae.tile_overlap_factor = 0.5


def scaling(pipe):
    pipe.vae.register_to_config(scaling_factor=0.9)


def shift(pipe):
    for factor in (0.8, 0.9):  # twice: the third configuration may have the address of the first
        pipe.vae.register_to_config(shift_factor=factor)


def shorter_prompts(pipe):
    pipe.tokenizer_max_length = 8


def hook_on_the_vae(pipe):
    pipe.vae.encoder.register_forward_hook(lambda _, inputs, out: out * 1.5)


def pre_hook_on_the_vae(pipe):
    pipe.vae.encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.5,))


def hook_on_t5(pipe):
    pipe.text_encoder_2.register_forward_hook(lambda _, inputs, out: (out[0] * 2,))


def hook_within_clip(pipe):
    norm = clip(pipe).final_layer_norm
    norm.register_forward_hook(lambda _, inputs, out: out * 2)


def patched(pipe):
    plain = pipe.vae.encoder.forward
    pipe.vae.encoder.forward = lambda x: plain(x) * 1.5


def patched_within(pipe):
    plain = conv(pipe)._conv_forward
    conv(pipe)._conv_forward = lambda *args: plain(*args) * 1.5


def processor(pipe):
    attention = pipe.vae.encoder.mid_block.attentions[0]

    class Twice(type(attention.processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * 2

    pipe.vae.encoder.mid_block.attentions[0].set_processor(Twice())


def epsilon(pipe):
    pipe.vae.encoder.conv_norm_out.eps = 0.9


def epsilon_of_t5(pipe):
    pipe.text_encoder_2.encoder.final_layer_norm.variance_epsilon = 0.9


def plain_attribute(pipe):
    pipe.vae.encoder.down_blocks[0].resnets[0].output_scale_factor = 2.0


def activation(pipe):
    pipe.vae.encoder.conv_act = nn.ReLU()


def layer_gone(pipe):
    del clip(pipe).encoder.layers[1]


def other_models(pipe):
    other = tiny_kontext(seed=4)
    pipe.vae, pipe.text_encoder = other.vae, other.text_encoder
    pipe.text_encoder_2 = other.text_encoder_2


def training(pipe):
    pipe.text_encoder_2.train()


class Wrapped:
    """A tokenizer that adds a word."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **kwargs):
        return self.tokenizer([f"{one} boat" for one in text], **kwargs)

    def __getattr__(self, name):
        return getattr(vars(self)["tokenizer"], name)


def wrapped_tokenizer(pipe):
    pipe.tokenizer_2 = Wrapped(pipe.tokenizer_2)


CHANGES = [
    embeddings_swapped, one_embedding, one_channel, one_channel_in, one_bias, a_little,
    attention_bias, buffer, tiles, overlap, scaling, shift, shorter_prompts, hook_on_the_vae,
    pre_hook_on_the_vae, hook_on_t5, hook_within_clip, patched, patched_within, processor, epsilon,
    epsilon_of_t5, plain_attribute, activation, layer_gone, other_models, training,
    wrapped_tokenizer,
]  # fmt: skip


def drawn(pipe, **call):
    torch.manual_seed(5)  # for random layers, such as dropout
    return edit(pipe, steps=1, **call)


@functools.cache
def plain_picture(change):
    pipe = tiny_kontext()
    change(pipe)
    return drawn(pipe)


@pytest.mark.parametrize("passes", [[], [MemoryLayout(), QKVFusion()]], ids=["alone", "behind"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_picture_is_of_what_was_before(passes, change):
    pipe = fluxfire.optimize(tiny_kontext(), [*passes, EncodingCache()])
    assert np.abs(plain_picture(change) - drawn(pipe)).max() > 1e-4
    change(pipe)
    for _ in range(2):
        apart = np.abs(drawn(pipe) - plain_picture(change)).max()
        assert apart <= (2e-5 if passes else 0)


def test_who_listens_hears_each_call(pipe):
    fluxfire.optimize(pipe, [EncodingCache()])
    edit(pipe, steps=1)
    heard = []
    modules = [pipe.vae.encoder, pipe.text_encoder_2, pipe.text_encoder_2.encoder.block[0]]
    handles = [m.register_forward_hook(lambda m, *_: heard.append(m)) for m in modules]
    for _ in range(2):
        edit(pipe, steps=1)
    assert [heard.count(module) for module in modules] == [2, 2, 2]
    for handle in handles:
        handle.remove()
    everywhere = nn.modules.module.register_module_forward_pre_hook(lambda m, _: heard.append(m))
    edit(pipe, steps=1)
    everywhere.remove()
    assert [heard.count(module) for module in modules] == [3, 3, 3]
    edit(pipe, steps=1)
    hits = told(pipe)
    edit(pipe, steps=1)
    assert told(pipe) == [hits[0] + 2, hits[1], hits[2] + 1, hits[3]]


def test_a_method_that_was_patched_before_is_called_each_time(pipe):
    calls, plain = [], pipe.vae.encode
    pipe.vae.encode = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    fluxfire.optimize(pipe, [EncodingCache()])
    for _ in range(2):
        edit(pipe, steps=1)
    assert len(calls) == 2


@pytest.mark.parametrize("first", [True, False])
def test_what_autocast_encoded_is_its_own(pipe, first):
    plain = tiny_kontext()

    def made(of, cast):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return edit(of, steps=1)

    fluxfire.optimize(pipe, [EncodingCache()])
    for cast in (first, not first, first):
        assert np.array_equal(made(pipe, cast), made(plain, cast))
    assert told(pipe) == [2, 4, 1, 2]


def test_pixels_in_another_order_are_encoded_anew(pipe):
    fluxfire.optimize(pipe, [EncodingCache()])
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pipe.vae.encode(pixels)
        pipe.vae.encode(pixels.contiguous(memory_format=torch.channels_last))
    assert told(pipe)[2:] == [0, 2]


def test_in_inference_mode_and_out_of_it(pipe, reference):
    fluxfire.optimize(pipe, [EncodingCache()])
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert np.array_equal(edit(pipe), reference)
    pipe.vae.requires_grad_(True)
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    pipe.vae.encode(pixels).latent_dist.mean.sum().backward()
    assert pixels.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["vae", "text_encoder_2", "tokenizer_2"])
def test_a_shallow_copy_has_its_own(pipe, reference, name):
    fluxfire.optimize(pipe, [EncodingCache()])
    edit(pipe)
    own, plain = copy.copy(pipe), tiny_kontext()
    for one in (own, plain):
        new = Wrapped(one.tokenizer_2) if name == "tokenizer_2" else None
        setattr(one, name, new or getattr(tiny_kontext(seed=4), name))
    assert np.array_equal(edit(own), edit(plain))
    assert np.array_equal(edit(pipe), reference)


def test_encoders_are_not_kept_alive(pipe):
    fluxfire.optimize(pipe, [EncodingCache()])
    edit(pipe, steps=1)
    gone = [weakref.ref(pipe.text_encoder_2), weakref.ref(pipe.vae.encoder.conv_in.weight)]
    pipe.text_encoder_2 = pipe.vae = None
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    facts = fluxfire.report(pipe).passes[0].facts
    assert (facts["prompts_kept"], facts["pictures_kept"]) == (1, 0)  # CLIP's results


def test_settings():
    with pytest.raises(ValueError, match="prompts=-1; it must be a whole number, 0 or more"):
        EncodingCache(prompts=-1)
    with pytest.raises(ValueError, match="has nothing to keep"):
        EncodingCache(prompts=0, pictures=0)


@pytest.mark.parametrize("what", ["find", "facts", "drop"])
def test_entries_that_another_thread_drops_meanwhile(monkeypatch, what):
    cache = _ResultCache(3)
    inputs = [torch.ones(2)]
    for number in range(3):
        cache.put((1, number), [torch.full((2,), float(number))], torch.ones(2))
    cache.put((1, 1), inputs, torch.full((2,), 7.0))
    drop_all = cache.entries.clear
    if what == "find":
        equal = torch.equal
        monkeypatch.setattr(torch, "equal", lambda *tensors: (drop_all(), equal(*tensors))[1])
        assert torch.equal(cache.find((1, 1), inputs).result, torch.full((2,), 7.0))
    elif what == "facts":
        monkeypatch.setattr(
            encoding_cache, "_tensors", lambda entry: (drop_all(), [torch.ones(2)])[1]
        )
        assert cache.facts()["bytes"] == 24
    else:
        cache.drop(1)
    assert not cache.entries
