"""Autocast, gradients, inference mode and casts: as in the plain pipeline, or refused by name."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

import fluxfire
from fluxfire.passes import (
    Attention,
    EncodingCache,
    FirstBlockCache,
    Float8,
    FoldedLora,
    FusedBlocks,
    MemoryLayout,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.testing import edit, tiny_kontext
from thinned import names, thinned

tiny = functools.partial(tiny_kontext, double_blocks=1, single_blocks=2)

EXACT = {
    "qkv": [QKVFusion()],
    "layout": [MemoryLayout()],
    "native": [Attention("_native_math")],
    "fused": [FusedBlocks()],
    "folded": [FoldedLora(), FusedBlocks()],
    "table": [ModulationTable()],
    "table-host": [ModulationTable(host=True)],
    "encodings": [EncodingCache()],
    "reference": [ReferenceCache(0)],
    "all": [QKVFusion(), MemoryLayout(), FusedBlocks(), ModulationTable(), EncodingCache()],
}
LOSSY = {
    "float8": [Float8()],
    "float8-drop": [Float8("drop")],
    "float8-fused": [Float8(), FusedBlocks()],
    "fa3-fp8": [Attention("fa3-fp8")],
    "reference": [ReferenceCache()],
    "first-block": [FirstBlockCache()],
}
ALL = {**LOSSY, **EXACT}


def cast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


@functools.cache
def plain_under_autocast(dtype):
    pipe = tiny(dtype=dtype)
    with cast():
        return edit(pipe, steps=2)


@pytest.mark.parametrize(
    ("of", "dtype"), thinned(ALL, [torch.float32, torch.bfloat16], 2), ids=names
)
def test_under_autocast(of, dtype):
    """Weights in float32, as in training, or in bfloat16 already; and as ever after it."""
    pipe = tiny(dtype=dtype)
    expected = plain_under_autocast(dtype)
    without = edit(pipe, steps=2)
    fluxfire.optimize(pipe, ALL[of])
    as_ever = edit(pipe, steps=2)
    with cast():
        made = edit(pipe, steps=2)
    rounding = np.abs(expected - edit(tiny(), steps=2)).max()
    assert np.abs(made - expected).max() <= 2 * rounding
    assert np.array_equal(edit(pipe, steps=2), as_ever)
    assert np.abs(as_ever - without).max() < 0.05


def inputs(pipe, **changed):
    """Arguments of one call of the transformer, of which the float ones want gradients."""
    generator = torch.Generator().manual_seed(0)
    config = pipe.transformer.config

    def noise(*shape):
        made = torch.randn(shape, generator=generator).to(pipe.transformer.dtype)
        return made.requires_grad_()

    ids = torch.zeros(10, 3)
    ids[5:, 0], ids[:, 2] = 1, torch.arange(10) % 5
    return {
        "hidden_states": noise(2, 10, config.in_channels),
        "encoder_hidden_states": noise(2, 6, config.joint_attention_dim),
        "pooled_projections": noise(2, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5, 0.7]),
        "guidance": torch.tensor([2.5, 2.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
        **changed,
    }


def gradients(pipe, *, checkpointing=False, autocast=False):
    """The result of a call, and the gradients of its inputs and of all weights by name."""
    transformer = pipe.transformer
    if checkpointing:
        transformer.enable_gradient_checkpointing()
        transformer.train()
    asked = inputs(pipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = transformer(**asked)[0]
    out.float().square().sum().backward()
    found = {k: v.grad for k, v in asked.items() if v.requires_grad}
    found |= {k: v.grad for k, v in transformer.named_parameters() if v.requires_grad}
    return out.detach(), found


def plain_gradients(**how):
    return gradients(prepared(how.pop("lora", False)), **how)


def prepared(lora):
    pipe = tiny()
    if lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            targets = ["to_q", "proj_mlp", "net.2"]
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            pipe.transformer.add_adapter(config)
    return pipe


@pytest.mark.parametrize(("of", "how"), thinned(EXACT, ["plainly", "checkpointing", "lora"], 2))
def test_gradients_of_exact_passes(of, how):
    lora, checkpointing = how == "lora", how == "checkpointing"
    expected, by_name = plain_gradients(lora=lora, checkpointing=checkpointing)
    pipe = fluxfire.optimize(prepared(lora), EXACT[of])
    made, found = gradients(pipe, checkpointing=checkpointing)
    assert torch.allclose(made, expected, atol=1e-5)
    assert set(by_name) <= set(found)
    for name, gradient in by_name.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            size = gradient.abs().max().item()
            assert torch.allclose(found[name], gradient, atol=1e-4 * size + 1e-6), name


@pytest.mark.parametrize("how", ["plainly", "checkpointing", "lora", "autocast"])
@pytest.mark.parametrize("of", ["float8", "float8-fused", "fa3-fp8"])
def test_gradients_of_float8(of, how):
    lora, checkpointing = how == "lora", how == "checkpointing"
    modes = {"checkpointing": checkpointing, "autocast": how == "autocast"}
    _, by_name = plain_gradients(lora=lora, **modes)
    pipe = fluxfire.optimize(prepared(lora), LOSSY[of])
    _, found = gradients(pipe, **modes)
    assert set(by_name) <= set(found)
    checked = 0
    for name, gradient in by_name.items():
        if gradient is None or gradient.norm() < 1e-6 * gradient.numel() ** 0.5:
            continue
        assert found[name] is not None, name
        flat = found[name].double().flatten(), gradient.double().flatten()
        assert torch.cosine_similarity(*flat, dim=0) > 0.98, name
        checked += 1
    assert checked > (10 if lora else 40)


def test_gradients_where_the_weights_are_gone():
    """Of inputs, norms, biases and adapters as ever; of the weights there are none."""
    _, by_name = plain_gradients(lora=True)
    pipe = fluxfire.optimize(prepared(lora=True), [Float8("drop")])
    edit(pipe, steps=1)
    for weight in pipe.transformer.parameters():
        weight.grad = None
    _, found = gradients(pipe)
    for name, gradient in by_name.items():
        if gradient is not None and gradient.norm() > 1e-4:
            flat = found[name].double().flatten(), gradient.double().flatten()
            assert torch.cosine_similarity(*flat, dim=0) > 0.98, name


@pytest.mark.parametrize("of", ALL)
def test_a_call_without_gradients_follows_one_with(of):
    pipe = fluxfire.optimize(tiny(), ALL[of])
    before = edit(pipe, steps=1)
    if of != "float8-drop":
        gradients(pipe)
    assert np.array_equal(edit(pipe, steps=1), before)


@pytest.mark.parametrize("of", ALL)
def test_with_gradients_on_in_a_generation(of, monkeypatch):
    """As some callers take `torch.no_grad` off the pipeline's call."""
    pipe = tiny()
    call = type(pipe).__call__.__wrapped__
    monkeypatch.setattr(type(pipe), "__call__", call)
    embeds, pooled, _ = pipe.encode_prompt("a cat", max_sequence_length=24)
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    plain = edit(pipe, steps=2, output_type="latent", **given)
    assert plain.requires_grad
    fluxfire.optimize(pipe, ALL[of])
    made = edit(pipe, steps=2, output_type="latent", **given)
    apart = (made - plain).abs().max() / plain.abs().max()
    assert apart < (1e-4 if of in EXACT else 0.05)
    assert made.requires_grad


def forward_derivative(pipe, *, by, around, scale=1.0):
    """The result of a call and its tangent, as `torch.func.jvp` gives them.

    Args:
        pipe: the pipeline.
        by: "inputs" differentiates by latents and time step, as consistency training does;
            "weights" by all weights.
        around: context of the call, such as `torch.no_grad`.
        scale: with `by="weights"`, the weights of the call are those of the model times this.
    """
    transformer = pipe.transformer
    asked = {k: v.detach() for k, v in inputs(pipe).items()}
    generator = torch.Generator().manual_seed(5)

    def direction(x):
        return torch.randn(x.shape, generator=generator).to(x) * 0.01

    if by == "inputs":
        x = (asked.pop("hidden_states"), asked.pop("timestep"))
        tangents = (direction(x[0]), torch.ones(2))

        def call(latents, timestep):
            return transformer(hidden_states=latents, timestep=timestep, **asked)[0]

    else:
        x = ({name: weight.detach() * scale for name, weight in transformer.named_parameters()},)
        tangents = ({name: direction(weight) for name, weight in x[0].items()},)

        def call(weights):
            return torch.func.functional_call(transformer, weights, kwargs=asked)[0]

    # torch has no forward derivative of its fast attention kernels.
    with around(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(call, x, tangents)


WAYS = [
    (by, around) for by in ("inputs", "weights") for around in (torch.no_grad, torch.enable_grad)
]


@pytest.mark.parametrize(
    ("of", "by", "around"), [(of, *way) for of, way in thinned(ALL, WAYS, 3)], ids=names
)
def test_forward_derivatives(of, by, around):
    scale = 1.25 if by == "weights" else 1.0  # other weights than those that passes prepared from
    expected = forward_derivative(tiny(), by=by, around=around, scale=scale)
    pipe = fluxfire.optimize(tiny(), ALL[of])
    for made, plain in zip(
        forward_derivative(pipe, by=by, around=around, scale=scale), expected, strict=True
    ):
        assert (made - plain).norm() / plain.norm() < (1e-5 if of in EXACT else 0.05)
    assert np.array_equal(edit(pipe, steps=1), edit(fluxfire.optimize(tiny(), ALL[of]), steps=1))


@pytest.mark.parametrize("of", ALL)
def test_gradients_by_torch_func(of):
    def gradient(pipe):
        asked = {k: v.detach() for k, v in inputs(pipe).items()}
        latents = asked.pop("hidden_states")
        return torch.func.grad(
            lambda x: pipe.transformer(hidden_states=x, **asked)[0].square().sum()
        )(latents)

    expected = gradient(tiny())
    made = gradient(fluxfire.optimize(tiny(), ALL[of]))
    assert (made - expected).norm() / expected.norm() < (1e-5 if of in EXACT else 0.1)


@pytest.mark.parametrize("of", ALL)
def test_a_call_with_lent_weights(of):
    """`torch.func.functional_call` lends other weights for one call, such as averaged ones."""

    @torch.no_grad()
    def call(pipe):
        asked = {k: v.detach() for k, v in inputs(pipe).items()}
        lent = {name: weight * 1.25 for name, weight in pipe.transformer.named_parameters()}
        return torch.func.functional_call(pipe.transformer, lent, kwargs=asked)[0]

    expected = call(tiny())
    pipe = fluxfire.optimize(tiny(), ALL[of])
    assert (call(pipe) - expected).norm() / expected.norm() < (1e-5 if of in EXACT else 0.05)
    assert np.array_equal(edit(pipe, steps=1), edit(fluxfire.optimize(tiny(), ALL[of]), steps=1))


@pytest.mark.parametrize("of", ALL)
def test_inference_mode(of):
    """Around `optimize`, around calls, around the building; and in calls outside it."""
    expected = edit(fluxfire.optimize(tiny(), ALL[of]), steps=2)
    built = tiny()
    with torch.inference_mode():
        fluxfire.optimize(built, ALL[of])
        assert np.array_equal(edit(built, steps=2), expected)
    assert np.array_equal(edit(built, steps=2), expected)
    with torch.inference_mode():
        pipe = tiny()
    fluxfire.optimize(pipe, ALL[of])
    for inside in (False, True, False):
        with torch.inference_mode(inside):
            assert np.array_equal(edit(pipe, steps=2), expected)
    if of != "float8-drop":
        fluxfire.restore(pipe)
        assert np.array_equal(edit(pipe, steps=2), edit(tiny(), steps=2))


def test_weights_made_in_inference_mode_are_read():
    """They have no counter of changes."""
    with torch.inference_mode():
        pipe = tiny()
    fluxfire.optimize(pipe, [Float8(), EncodingCache()])
    before = edit(pipe, steps=1)
    with torch.inference_mode():
        pipe.transformer.single_transformer_blocks[0].proj_mlp.weight.mul_(2)
        pipe.vae.encoder.conv_in.weight.mul_(2)
    assert np.abs(edit(pipe, steps=1) - before).max() > 1e-3


def twice_cast(pipe):
    pipe.to(torch.bfloat16)
    edit(pipe, steps=1)
    pipe.to(torch.float32)
    return pipe


@pytest.mark.parametrize("of", ALL)
def test_casts_and_back(of):
    """Weights lose bits by it, so those of the plain pipeline do, too."""
    pipe = fluxfire.optimize(tiny(), ALL[of])
    pipe.to(torch.bfloat16)
    with_half = edit(pipe, steps=2)
    half = edit(tiny().to(torch.bfloat16), steps=2)
    assert np.abs(with_half - half).max() < 0.05
    pipe.to(torch.float32)
    plain = twice_cast(tiny())
    bound = 2e-5 if of in EXACT else 0.05
    assert np.abs(edit(pipe, steps=2) - edit(plain, steps=2)).max() < bound
    if of.startswith("float8") and of != "float8-drop":
        fresh = fluxfire.optimize(plain, ALL[of])
        assert np.array_equal(edit(pipe, steps=2), edit(fresh, steps=2))


@pytest.mark.parametrize("of", EXACT)
def test_double_precision_stays_double(of):
    """A kernel that computes in float32 would lose half of the digits."""

    def call(pipe):
        asked = {k: v.detach().double() for k, v in inputs(pipe).items()}
        with torch.no_grad():
            return pipe.transformer(**asked)[0]

    plain, pipe = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    expected = call(plain)
    if not fluxfire.plan(pipe, EXACT[of]).ok:
        return
    made = call(fluxfire.optimize(pipe, EXACT[of]))
    assert made.dtype == torch.float64
    assert (made - expected).norm() / expected.norm() < 1e-12
