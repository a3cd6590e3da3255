"""Attention: the choice of a kernel, its scope, and the arithmetic around the float8 kernel."""

from __future__ import annotations

import copy
import dataclasses
from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models import attention_dispatch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fluxfire
from fluxfire import modules
from fluxfire.environment import environment
from fluxfire.errors import PlanError
from fluxfire.kernels.flash_attention import float8_attention
from fluxfire.kernels.float8 import E4M3
from fluxfire.kernels.heads import Stream, joint_heads
from fluxfire.kontext import KONTEXT
from fluxfire.kontext.attention import SCALES_ATTRIBUTE, query_key_scale
from fluxfire.passes import Attention, Compile, FusedBlocks, QKVFusion
from fluxfire.passes import attention as module
from fluxfire.passes.shared import attention_backends
from fluxfire.protocol import Target
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from passes.test_compile import with_ip_adapter
from thinned import thinned

SIZES = attention_backends.Sizes(torch.device("cpu"), torch.float32, 3, 16)
LAYERS = 5  # attentions of the tiny transformer


def active_backend():
    return attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]


def attentions(pipe):
    return [block.attn for block in KONTEXT.blocks(pipe.transformer)]


class Calls(TorchDispatchMode):
    """Counts the calls of one of fluxfire's operators."""

    def __init__(self, name):
        super().__init__()
        self.operator = getattr(torch.ops.fluxfire, name).default
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.operator
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unrefused(monkeypatch):
    """Allow a kernel that the pass refuses on this machine."""
    monkeypatch.setattr(Attention, "check", lambda *_: ())


# Configuration


def test_settings():
    by_member = Attention(attention_dispatch.AttentionBackendName.NATIVE)
    assert by_member == Attention("native")
    assert repr(by_member) == "Attention(backend='native')"
    for backend in ("auto", "flash", "fa3"):
        assert Attention(backend).exactness == "close"
    assert Attention("fa3-fp8").exactness == Attention("sage").exactness == "lossy"
    with pytest.raises(ValueError, match=r"^backend='flsh'; it must be one of auto, fa3, fa3-fp8,"):
        Attention("flsh")


def test_auto_on_a_cpu_is_native_and_says_so(pipe, reference):
    fluxfire.optimize(pipe, [Attention()])
    (done,) = fluxfire.report(pipe).passes
    assert str(done.findings[0]) == "no GPU to measure on; using PyTorch's native attention"
    assert done.change.count == LAYERS
    assert done.change.what == "attentions computed by native, unmeasured without a GPU"
    assert np.array_equal(edit(pipe), reference)


# Scope


def test_only_this_transformers_processors_are_set():
    active = active_backend()
    pipe, other = tiny_kontext(), tiny_kontext()
    edit(pipe)
    before = fingerprint(pipe)
    fluxfire.optimize(pipe, [Attention("_native_math")])
    chosen = attention_dispatch.AttentionBackendName("_native_math")
    assert [a.processor._attention_backend for a in attentions(pipe)] == [chosen] * LAYERS
    assert [a.processor._attention_backend for a in attentions(other)] == [None] * LAYERS
    assert FluxAttnProcessor._attention_backend is None
    assert active_backend() is active
    fluxfire.restore(pipe)
    assert differences(before, fingerprint(pipe)) == []
    assert all("_attention_backend" not in vars(a.processor) for a in attentions(pipe))


def test_the_users_own_choice_comes_back(pipe):
    for attention in attentions(pipe):
        attention.processor._attention_backend = "_native_math"
    processors = [a.processor for a in attentions(pipe)]
    for backend in ("native", "fa3-fp8"):
        with fluxfire.optimized(pipe, [Attention(backend)]):
            edit(pipe, steps=1)
        assert [a.processor for a in attentions(pipe)] == processors
        assert {p._attention_backend for p in processors} == {"_native_math"}


def test_a_chosen_backend_is_the_one_that_runs(pipe, monkeypatch):
    name, ran = attention_dispatch.AttentionBackendName("_native_math"), []
    plain = attention_dispatch._AttentionBackendRegistry._backends[name]

    def recorded(*args, **kwargs):
        ran.append(name)
        return plain(*args, **kwargs)

    fluxfire.optimize(pipe, [FusedBlocks(), Attention("_native_math")])
    monkeypatch.setitem(attention_dispatch._AttentionBackendRegistry._backends, name, recorded)
    edit(pipe, steps=1)
    assert len(ran) == LAYERS


@pytest.mark.parametrize("before", [[], [QKVFusion()], [FusedBlocks()]], ids=str)
def test_float8_composes(before, reference):
    alone = edit(fluxfire.optimize(tiny_kontext(), [Attention("fa3-fp8")]))
    pipe = fluxfire.optimize(tiny_kontext(), [*before, Attention("fa3-fp8")])
    with Calls("float8_attention") as calls:
        picture = edit(pipe, steps=2)
    assert calls.count == 2 * LAYERS
    picture = edit(pipe)
    assert np.abs(picture - alone).max() < 0.02
    assert 0 < np.abs(picture - reference).max() < 0.1


@pytest.mark.parametrize("before", [[], [QKVFusion()], [FusedBlocks()]], ids=str)
def test_flash_attention_composes(before, reference, unrefused):
    """Without a GPU this runs torch's attention, so it tests everything around the kernel."""
    pipe = fluxfire.optimize(tiny_kontext(), [*before, Attention("fa3")])
    with Calls("flash_attention") as calls:
        picture = edit(pipe)
    assert calls.count == 3 * LAYERS
    assert np.abs(picture - reference).max() < 1e-5


def test_a_mask_and_gradients_run_as_in_diffusers(pipe):
    mask = torch.ones(1, 1, 1, 24 + 2 * 16 * 4, dtype=torch.bool)
    mask[..., 3:24] = False  # most of the text
    call = {"joint_attention_kwargs": {"attention_mask": mask}}
    expected = edit(pipe, **call)
    fluxfire.optimize(pipe, [Attention("fa3-fp8")])
    assert np.array_equal(edit(pipe, **call), expected)
    block = pipe.transformer.single_transformer_blocks[0]
    with Calls("float8_attention") as calls:
        out = block.attn(torch.randn(1, 8, 48, requires_grad=True))
        out.sum().backward()
    assert calls.count == 0


def test_ip_adapters_keep_their_processors(reference):
    call = {
        "ip_adapter_image_embeds": [torch.randn(1, 1, 12, generator=torch.Generator())],
        "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 12)],
    }
    pipe = with_ip_adapter(tiny_kontext())
    expected = edit(pipe, **call)
    assert np.abs(expected - reference).max() > 1e-3
    with fluxfire.optimized(pipe, [Attention("_native_math")]):
        assert np.abs(edit(pipe, **call) - expected).max() < 1e-5
    with pytest.raises(PlanError, match="runs through FluxIPAdapterAttnProcessor, and backend="):
        fluxfire.optimize(pipe, [Attention("fa3-fp8")])


def test_ip_adapters_that_come_and_go(pipe, reference):
    fluxfire.optimize(pipe, [Attention("fa3-fp8")])
    expected = edit(pipe)
    with_ip_adapter(pipe).unload_ip_adapter()
    assert edit(pipe).shape == expected.shape
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), reference)


# Refusals


def refusals(pass_, pipe, **facts):
    """Return what `check` says for an environment other than this machine's."""
    target = Target(pipe, dataclasses.replace(environment(), **facts))
    return [str(finding) for finding in pass_.check(target) if finding.level == "error"]


def test_fa3_is_refused_where_it_cannot_run(pipe, monkeypatch):
    monkeypatch.setattr(module, "_device", lambda pipe: torch.device("cuda"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert refusals(Attention("fa3-fp8"), pipe, gpu="NVIDIA A100", capability=(8, 0)) == [
        (
            "NVIDIA A100 has compute capability 8.0, and FlashAttention-3 needs 9.0; use "
            "Attention(), which finds a kernel that runs here"
        ),
        "FlashAttention-3 is not installed; pip install fa3-fwd, or use Attention()",
        (
            "the transformer is in torch.float32, and fa3-fp8 takes torch.bfloat16 or "
            "torch.float16; cast the pipeline, or use Attention()"
        ),
    ]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    modules.move_and_cast(pipe, device="cpu", dtype=torch.bfloat16)
    assert refusals(Attention("fa3-fp8"), pipe, gpu="NVIDIA H100", capability=(9, 0)) == []


def test_fa3_is_refused_on_a_cpu_and_replaced_in_the_suggestion(pipe):
    planned = fluxfire.plan(pipe, [Attention("fa3"), Compile()])
    (said,) = planned.complaints()
    assert said == (
        "attention: the pipeline runs on cpu, and FlashAttention-3 needs a Hopper GPU; use "
        "Attention(), which finds a kernel that runs here"
    )
    assert planned.suggestion == (Attention(), Compile())


def test_float8_on_a_cpu_is_told_to_be_emulated(pipe):
    fluxfire.optimize(pipe, [Attention("fa3-fp8")])
    (done,) = fluxfire.report(pipe).passes
    assert done.change.what == "attentions computed by fa3-fp8, emulated without a GPU"
    assert [f.level for f in done.findings] == ["warning"]


class Strange(FluxAttnProcessor):
    """A user's own processor; it may do anything."""


@pytest.mark.parametrize("backend", ["auto", "native", "fa3", "fa3-fp8"])
def test_unknown_processors_are_refused_by_name(pipe, backend):
    pipe.transformer.set_attn_processor(Strange())
    said, *_ = refusals(Attention(backend), pipe)
    assert said.startswith(
        f"the transformer's attention runs through Strange, and backend={backend!r}"
    )
    assert said.endswith("; leave Attention out")


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (
            "_native_cudnn",
            r"backend='_native_cudnn' does not run here: .+; use Attention\(\), which",
        ),
        ("flash", r"backend='flash' does not run here: .+; use Attention\(\), which finds a"),
        ("flash_hub", "backend='flash_hub' runs code downloaded from the Hub; install the package"),
    ],
)
def test_backends_that_do_not_run_here(pipe, backend, words):
    if backend not in {b.value for b in attention_dispatch.AttentionBackendName}:
        pytest.skip("this diffusers does not know it")
    with pytest.raises(PlanError, match=words):
        fluxfire.optimize(pipe, [Attention(backend)])


# Measuring


def test_what_is_not_clearly_faster_is_not_chosen():
    def choose(compiles=lambda name: True, **took):
        return attention_backends.choose_backend({"native": 1.0} | took, compiles)

    assert choose() == "native"
    assert choose(flash=0.995) == "native"
    assert choose(flash=0.98, _flash_3=0.97) == "_flash_3"
    assert choose(flash=0.98, _flash_3=0.97, compiles=lambda name: name != "_flash_3") == "flash"
    assert choose(flash=0.98, _flash_3=0.97, compiles=lambda name: False) == "native"


def test_measuring_leaves_out_what_fails(monkeypatch):
    monkeypatch.setattr(attention_backends, "_TOKENS", 48)
    made = attention_backends.measure.__wrapped__(SIZES)
    assert made.milliseconds["native"] > 0
    assert "flash" in made.failed
    assert made.backend in made.milliseconds
    assert made.facts()["left_out"] == made.failed


def test_a_wrong_kernel_is_left_out(monkeypatch):
    name = attention_dispatch.AttentionBackendName("_native_math")
    wrong = lambda query, key, value, **_: value  # noqa: E731
    monkeypatch.setitem(attention_dispatch._AttentionBackendRegistry._backends, name, wrong)
    arguments = {"query", "key", "value"}
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._supported_arg_names, name, arguments)
    assert attention_backends.find_problem("_native_math", SIZES).startswith(
        "it is off the native result by "
    )


@pytest.mark.slow
def test_the_native_kernel_compiles():
    assert attention_backends._compiles("native", SIZES)


def test_the_measured_choice_is_set_and_told(pipe, monkeypatch):
    made = attention_backends.Measured(
        "_native_math", {"native": 2.0, "_native_math": 1.5}, {"flash": "no"}
    )
    monkeypatch.setattr(module, "measure", lambda *_: made)
    monkeypatch.setattr(module, "_device", lambda pipe: torch.device("cuda"))
    fluxfire.optimize(pipe, [Attention()])
    (done,) = fluxfire.report(pipe).passes
    assert done.change.what == (
        "attentions computed by _native_math (of native 2.000 ms, _native_math 1.500 ms)"
    )
    assert done.facts["milliseconds"] == {"native": 2.0, "_native_math": 1.5}
    chosen = attention_dispatch.AttentionBackendName("_native_math")
    assert {a.processor._attention_backend for a in attentions(pipe)} == {chosen}


# The arithmetic of float8


def heads(seed, tokens=40, *, batch=2, count=3, width=16):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, count * width, generator=generator) for _ in range(3)]


def rotary(tokens, width=16):
    angles = torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(0)) * 6.3
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def scales(value, *, weights, width=16):
    largest = value.float().view(*value.shape[:2], -1, width).abs().amax((1, 3))
    return query_key_scale([weights], width), query_key_scale([weights], width), largest / 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e3])
def test_float8_attention_against_float64(dtype, size):
    """Three bits of mantissa cause an error of at most 1/16, and 1/40 on average."""
    for seed in range(4):
        q, k, v = (x.to(dtype) for x in heads(seed))
        v, ones = v * size, torch.ones(16, dtype=dtype)
        cos, sin = rotary(40)
        by = scales(v, weights=ones)
        made = joint_heads([Stream((q, k, v), (ones, ones))], (cos, sin), 1e-6, scales=by)
        assert {x.dtype for x in made} == {E4M3}
        out = float8_attention(*made, *by, dtype)
        assert out.dtype == dtype
        norm = torch.nn.RMSNorm(16, eps=1e-6, elementwise_affine=False)
        q, k, v = (x.double().view(2, 40, 3, 16) for x in (q, k, v))
        q, k = (
            apply_rotary_emb(norm(x), (cos.double(), sin.double()), sequence_dim=1).double()
            for x in (q, k)
        )
        exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        exact = exact.transpose(1, 2)
        assert (out - exact).norm() < 0.06 * exact.norm()


def test_two_streams_are_one_beside_the_other():
    ones, (cos, sin) = torch.ones(16), rotary(40)
    streams = heads(1)
    text, image = [x[:, :12] for x in streams], [x[:, 12:] for x in streams]
    by = scales(streams[2], weights=ones)
    joint, alone = (
        joint_heads([Stream(tuple(x), (ones, ones)) for x in of], (cos, sin), 1e-6, scales=by)
        for of in ((text, image), (streams,))
    )
    for one, other in zip(joint, alone, strict=True):
        assert torch.equal(one.float(), other.float())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 3), bfloat16=st.booleans())
def test_normed_and_rotated_heads_keep_to_the_bound(seed, spread, bfloat16):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    width, tokens = 16, 12
    norm = torch.nn.RMSNorm(width, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=generator) * spread + 1)
    x = torch.randn(1, tokens, 2, width, generator=generator)
    x = x**5 if seed % 2 else x  # one large number in a head comes nearest to the bound
    angles = (torch.rand(tokens, width // 2, generator=generator) * 6.3).repeat_interleave(2, dim=1)
    with torch.no_grad():
        rotated = apply_rotary_emb(norm(x.to(dtype)), (angles.cos(), angles.sin()), sequence_dim=1)
    largest = float(query_key_scale([norm.weight], width)) * 448
    assert float(rotated.abs().amax()) <= largest * (1 + 2.0**-6)  # the rounding of bfloat16


def test_the_bound_is_reached():
    norm = torch.nn.RMSNorm(16, eps=0)
    one_hot = torch.zeros(1, 1, 1, 16).index_fill(-1, torch.tensor([5]), 7.0)
    assert float(norm(one_hot).detach().amax()) == pytest.approx(sqrt(16))
    assert float(query_key_scale([norm.weight], 16)) * 448 == pytest.approx(sqrt(16))


def test_the_bound_follows_the_weights(pipe):
    """The user may replace norms by ones with a larger output after the pass was applied."""
    fluxfire.optimize(pipe, [Attention("fa3-fp8")])
    edit(pipe)
    attention = pipe.transformer.single_transformer_blocks[0].attn
    before = float(getattr(attention, SCALES_ATTRIBUTE).query)
    with torch.no_grad():
        attention.norm_q.weight.mul_(100)
    edit(pipe)
    assert float(getattr(attention, SCALES_ATTRIBUTE).query) == pytest.approx(100 * before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "backend"),
    thinned([[], [FusedBlocks()]], ["auto", "native", "fa3", "fa3-fp8"], 2),
    ids=str,
)
@pytest.mark.usefixtures("unrefused")
def test_a_block_stays_one_graph(before, backend):
    passes = [*before, Attention(backend)]
    plain = edit(fluxfire.optimize(tiny_kontext(), passes))
    pipe = fluxfire.optimize(tiny_kontext(), [*passes, Compile(fullgraph=True)])
    assert np.abs(edit(pipe) - plain).max() < (1e-4 if backend != "fa3-fp8" else 0.02)
    (run,) = fluxfire.report(pipe).runs
    assert run.graph_breaks == 0
    assert (
        run.compiles <= 3
    )  # double, single, and single after a single: the same as without the pass


def _hooked(attention):
    attention.norm_q.register_forward_hook(lambda *call: call[-1] * 3)


def _patched(attention):
    plain = attention.norm_k.forward
    attention.norm_k.forward = lambda x: plain(x) * 3


def _other_eps(attention):
    attention.norm_k.eps = 0.5


def _layer_norm(attention):
    attention.norm_q = torch.nn.LayerNorm(attention.norm_q.normalized_shape)


@pytest.mark.parametrize("change", [_hooked, _patched, _other_eps, _layer_norm])
@pytest.mark.parametrize("when", ["before", "after"])
def test_head_norms_that_a_kernel_cannot_compute_are_called(pipe, change, when):
    plain, before = tiny_kontext(), edit(pipe)
    if when == "after":
        fluxfire.optimize(pipe, [Attention("fa3-fp8")])
        edit(pipe)
    for each in (plain, pipe):
        for block in each.transformer.single_transformer_blocks:
            change(block.attn)
    if when == "before":
        fluxfire.optimize(pipe, [Attention("fa3-fp8")])
    expected = edit(plain)
    assert np.abs(expected - before).max() > 1e-3
    assert np.abs(edit(pipe) - expected).max() < 5e-4  # by float8 in the other blocks
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), expected)


def test_a_block_put_in_later_has_its_scales(pipe):
    plain = tiny_kontext()
    fluxfire.optimize(pipe, [Attention("fa3-fp8")])
    edit(pipe)
    for each in (plain, pipe):
        blocks = each.transformer.single_transformer_blocks
        blocks.append(copy.deepcopy(blocks[0]))
        blocks[-1].attn.norm_q.weight.data.mul_(3)
    expected = edit(fluxfire.optimize(copy.deepcopy(plain), [Attention("fa3-fp8")]))
    assert np.array_equal(edit(pipe), expected)
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), edit(plain))
    assert not [k for b in blocks for k in vars(b.attn) if k.startswith("_fluxfire")]
