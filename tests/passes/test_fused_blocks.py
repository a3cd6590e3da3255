"""FusedBlocks: the arithmetic of the kernels, and the fallback to diffusers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import fluxfire
from fluxfire.environment import environment
from fluxfire.errors import PlanError
from fluxfire.kontext import KONTEXT
from fluxfire.passes import Compile, FusedBlocks, QKVFusion
from fluxfire.passes import fused_blocks as module
from fluxfire.protocol import Target
from fluxfire.testing import edit, forward_errors, tiny_kontext
from passes.test_qkv_fusion import with_lora

CLOSE = 1e-5


@pytest.fixture
def norms(monkeypatch):
    """Count the calls of the operator that every fused block starts with."""
    calls = []
    plain = module.modulated_norm

    def counted(*args):
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(module, "modulated_norm", counted)
    return calls


@pytest.mark.parametrize("before", [[], [QKVFusion()]], ids=["alone", "behind fusion"])
@pytest.mark.parametrize(
    "call",
    [{}, {"num_images_per_prompt": 2}, {"negative_prompt": "a boat", "true_cfg_scale": 2.0}],
    ids=["one", "batch", "true CFG"],
)
def test_pictures_are_the_plain_ones_up_to_rounding(pipe, norms, before, call):
    plain = edit(pipe, **call)
    fluxfire.optimize(pipe, [*before, FusedBlocks()])
    assert np.abs(edit(pipe, **call) - plain).max() < CLOSE
    assert len(norms) > 0


def test_it_errs_as_eager_does_in_bfloat16():
    plain, pipe = (tiny_kontext(dtype=torch.bfloat16) for _ in range(2))
    fused, eager = forward_errors(plain, fluxfire.optimize(pipe, [FusedBlocks()]), edit)
    assert fused < 1.1 * eager


def test_what_the_kernels_do_not_compute_runs_as_in_diffusers(pipe, norms):
    class Own(FluxAttnProcessor):
        pass

    double = tiny_kontext().transformer.transformer_blocks[0]
    single = tiny_kontext().transformer.single_transformer_blocks[0]
    text, image, temb = torch.randn(1, 3, 48), torch.randn(1, 5, 48), torch.randn(1, 48)
    rotary = (torch.rand(8, 16), torch.rand(8, 16))
    fluxfire.optimize(pipe, [FusedBlocks()])
    blocks = KONTEXT.blocks(pipe.transformer)
    for plain, block in ((double, blocks[0]), (single, blocks[2])):
        with torch.no_grad():
            for arguments in ((None, None), (rotary, {"attention_mask": torch.ones(8, 8).bool()})):
                expected = plain(image, text, temb, *arguments)
                made = block(image, text, temb, *arguments)
                assert all(map(torch.equal, made, expected))
            block.attn.processor = Own()
            made, expected = (b(image, text, temb, rotary) for b in (block, plain))
            assert all(map(torch.equal, made, expected))
            block.attn.processor = FluxAttnProcessor()
        made = block(image.requires_grad_(), text, temb, rotary)
        made[1].sum().backward()
        assert image.grad is not None
    assert norms == []


@pytest.mark.parametrize("first", [True, False])
def test_a_lora_has_its_effect_whichever_came_first(first, reference):
    expected = edit(with_lora(tiny_kontext()))
    assert np.abs(expected - reference).max() > 1e-3
    pipe = tiny_kontext()
    if first:
        with_lora(pipe)
    fluxfire.optimize(pipe, [FusedBlocks()])
    if not first:
        with_lora(pipe)
    assert np.abs(edit(pipe) - expected).max() < CLOSE


def test_offloading_layer_by_layer(pipe, reference):
    """Refused if it is enabled before; a fallback to diffusers' own if it is enabled later."""
    from accelerate import cpu_offload

    fluxfire.optimize(pipe, [FusedBlocks()])
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert np.array_equal(edit(pipe), reference)
    pipe = tiny_kontext()
    found = FusedBlocks().check(Target(pipe, environment(), traits=frozenset({"group-offload"})))
    assert [str(f) for f in found] == [
        (
            "offloading moves weights layer by layer while the pipeline runs (group-offload), "
            "and the kernels read several layers at once; use enable_model_cpu_offload() or none"
        )
    ]


def with_casting(pipe):
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def with_hooks(pipe):
    for block in KONTEXT.blocks(pipe.transformer):
        block.attn.norm_q.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
    block.proj_mlp.register_forward_hook(lambda _, inputs, out: out * 0.5)


@pytest.mark.parametrize("hook", [with_casting, with_hooks])
def test_hooks_that_come_later_are_heard(hook, reference):
    plain, pipe = tiny_kontext(), fluxfire.optimize(tiny_kontext(), [FusedBlocks()])
    edit(pipe)
    hook(plain)
    hook(pipe)
    expected = edit(plain)
    assert np.abs(expected - reference).max() > 1e-3
    assert np.array_equal(edit(pipe), expected)


def test_a_hook_taken_off_is_forgotten(pipe, norms):
    hook = pipe.transformer.transformer_blocks[0].norm2.register_forward_hook(lambda *_: None)
    fluxfire.optimize(pipe, [FusedBlocks()])
    edit(pipe, steps=1)
    without_one = len(norms)
    hook.remove()
    edit(pipe, steps=1)
    assert len(norms) == 2 * without_one + 4  # the norms of a double block


def test_a_quantized_layer_is_called_as_it_is(pipe, reference):
    """torchao leaves a plain layer whose weight is a tensor subclass."""

    class Quantized(torch.Tensor):
        pass

    for block in pipe.transformer.single_transformer_blocks:
        for layer in (block.proj_mlp, block.proj_out):
            layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Quantized), False)
    fluxfire.optimize(pipe, [FusedBlocks()])
    assert np.abs(edit(pipe) - reference).max() < CLOSE


def test_foreign_blocks_are_refused(pipe):
    class Strange(type(pipe.transformer.transformer_blocks[0])):
        pass

    pipe.transformer.transformer_blocks[0].__class__ = Strange
    with pytest.raises(
        PlanError,
        match="the transformer has blocks of another kind: Strange; leave FusedBlocks out",
    ):
        fluxfire.optimize(pipe, [FusedBlocks()])


@pytest.mark.slow
def test_a_block_stays_one_graph_at_any_size():
    pipe = tiny_kontext()
    sizes = ((32, 32), (48, 32), (32, 64))
    plain = [edit(pipe, size) for size in sizes]
    fluxfire.optimize(pipe, [FusedBlocks(), Compile()])
    for size, expected in zip(sizes, plain, strict=True):
        assert np.abs(edit(pipe, size) - expected).max() < CLOSE
    runs = fluxfire.report(pipe).runs
    assert [run.graph_breaks for run in runs] == [0, 0, 0]
    assert runs[0].compiles <= 3  # double, single, and single after a single
    assert runs[2].compiles == 0  # the second size made the graphs dynamic


def _affine(norm):
    made = torch.nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    made.weight.data.fill_(2.0)
    made.bias.data.fill_(0.5)
    return made


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 1.5


def _of_a_subclass(of):
    """Turn a module into an instance of a subclass with its own forward."""

    def forward(self, *args, **kwargs):
        out = type(of).__mro__[0].__bases__[0].forward(self, *args, **kwargs)
        return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5

    of.__class__ = type("Own", (of.__class__,), {"forward": forward})


def _head_norm(block):
    block.attn.norm_q = torch.nn.LayerNorm(block.attn.norm_q.normalized_shape)


def _double(change):
    def on(pipe):
        for block in pipe.transformer.transformer_blocks:
            change(block)

    return on


def _single(change):
    def on(pipe):
        for block in pipe.transformer.single_transformer_blocks:
            change(block)

    return on


OTHER_PARTS = {
    "an affine norm2": _double(lambda b: setattr(b, "norm2", _affine(b.norm2))),
    "an affine norm": _single(lambda b: setattr(b.norm, "norm", _affine(b.norm.norm))),
    "an adapter behind an MLP": _double(lambda b: b.ff.net.append(Wrapper(torch.nn.Identity()))),
    "an MLP within another module": _double(lambda b: setattr(b, "ff", Wrapper(b.ff))),
    "an MLP of a subclass": _double(lambda b: _of_a_subclass(b.ff)),
    "an attention of a subclass": _single(lambda b: _of_a_subclass(b.attn)),
    "a norm of a subclass": _double(lambda b: _of_a_subclass(b.norm1)),
    "another head norm": _double(_head_norm),
    "another head norm, single": _single(_head_norm),
}


@pytest.mark.parametrize("what", OTHER_PARTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_parts_that_are_not_flux_s_run_as_in_diffusers(pipe, what, when):
    plain, before = tiny_kontext(), edit(pipe)
    if when == "after":
        fluxfire.optimize(pipe, [FusedBlocks()])
        edit(pipe)
    for each in (plain, pipe):
        OTHER_PARTS[what](each)
    if when == "before":
        fluxfire.optimize(pipe, [FusedBlocks()])
    expected = edit(plain)
    assert np.abs(expected - before).max() > 1e-4
    assert np.abs(edit(pipe) - expected).max() < 1e-5
