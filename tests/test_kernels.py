"""Compares every operator with float64, and the Triton kernels with the operators."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxfire import kernels
from fluxfire.kernels import float8
from fluxfire.kernels.flash_attention import flash_attention, float8_attention
from fluxfire.kernels.heads import Stream

SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "text": st.integers(1, 7),
        "image": st.integers(1, 9),
        "heads": st.sampled_from([1, 3, 8]),
        "seed": st.integers(0, 2**32 - 1),
    }
)
WIDTH = 16  # head width
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # one rounding at the end
EIGHT_BITS = 2.0**-4  # half a step of e4m3, relative


def drawn(shape, dtype, *widths):
    """Random text and image streams, the image's rows parts of longer ones, then vectors."""
    generator = torch.Generator().manual_seed(shape["seed"])
    make = lambda *size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    width = shape["heads"] * WIDTH
    text = make(shape["batch"], shape["text"], width)
    image = make(shape["batch"], shape["image"], 2 * width)[..., width:]
    return text, image, *(make(*(n or (shape["batch"], width))) for n in widths)


def off(made, exact):
    return float((made.double() - exact).norm() / exact.norm())


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, alone=st.booleans())
def test_norms_and_residuals(shape, dtype, alone):
    text, image, shift, scale = drawn(shape, dtype, None, None)
    text = None if alone else text
    joint = (image if alone else torch.cat([text, image], 1)).double()
    exact = F.layer_norm(joint, joint.shape[-1:], eps=1e-6)
    exact = exact * (1 + scale.double()[:, None]) + shift.double()[:, None]
    made = kernels.modulated_norm(image, text, shift, scale, 1e-6)
    assert made.dtype == dtype
    assert off(made, exact) < ERROR[dtype]

    rows = float8.QuantizedRows(*float8.modulated_norm_float8(image, text, shift, scale, 1e-6))
    assert off(rows.data.double() * rows.scale.double(), exact) < EIGHT_BITS

    add = made.flip(1)
    exact = joint + shift.double()[:, None] * add.double()
    assert off(kernels.gated_add(image, text, shift, add), exact) < ERROR[dtype]


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, dtype=DTYPES)
def test_heads(shape, dtype):
    one = (WIDTH,)
    text, image, *weights = drawn(shape, dtype, one, one, one, one)
    tokens = shape["text"] + shape["image"]
    angles = torch.rand(tokens, WIDTH // 2).repeat_interleave(2, 1) * 6.3
    cos, sin = angles.cos(), angles.sin()

    def exact(x, weight, rows):
        x = x.double().unflatten(-1, (-1, WIDTH))
        x = F.rms_norm(x, (WIDTH,), weight.double(), 1e-6)
        return apply_rotary_emb(x, (cos[rows].double(), sin[rows].double()), sequence_dim=1)

    first, rest = slice(0, shape["text"]), slice(shape["text"], None)
    of_image, of_text = [image, image + 1, image * 2], [text, text - 1, text * 3]
    streams = [
        Stream(tuple(of_text), tuple(weights[2:])),
        Stream(tuple(of_image), tuple(weights[:2])),
    ]
    cached = [torch.randn(shape["batch"], 4, shape["heads"], WIDTH).to(dtype) for _ in range(2)]
    q, k, v = kernels.joint_heads(streams, (cos, sin), 1e-6, cached=cached)
    assert torch.equal(k[:, -4:], cached[0])
    assert torch.equal(v[:, -4:], cached[1])
    k, v = k[:, :-4], v[:, :-4]
    for made, number in ((q, 0), (k, 1)):
        parts = [
            exact(of_text[number], weights[2 + number], first),
            exact(of_image[number], weights[number], rest),
        ]
        assert off(made, torch.cat(parts, 1).double()) < ERROR[dtype]
    assert torch.equal(v.flatten(2), torch.cat([of_text[2], of_image[2]], 1))

    q, k, v = kernels.joint_heads(streams[1:], (cos[rest], sin[rest]), 1e-6)
    assert torch.equal(v.flatten(2), of_image[2])
    assert off(q, exact(of_image[0], weights[0], rest).double()) < ERROR[dtype]
    assert off(k, exact(of_image[1], weights[1], rest).double()) < ERROR[dtype]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, dtype=DTYPES)
def test_products(shape, dtype):
    width = shape["heads"] * WIDTH
    x, y, w_in, w_out, bias = drawn(shape, dtype, (2 * width, width), (width, 3 * width), (width,))
    y = y[:, :1].expand(-1, x.shape[1], -1)
    both = torch.cat([bias, bias])
    exact = F.gelu(F.linear(x.double(), w_in.double(), both.double()), approximate="tanh")
    hidden = kernels.linear_gelu(x, w_in, both)
    assert off(hidden, exact) < 3 * ERROR[dtype]
    exact = F.linear(torch.cat([y, hidden], -1).double(), w_out.double(), bias.double())
    assert off(kernels.two_products(y, hidden, w_out, bias), exact) < 3 * ERROR[dtype]

    rows = float8.QuantizedRows(*float8.gelu_float8(y, hidden))
    exact = torch.cat([y.double(), F.gelu(hidden.double(), approximate="tanh")], -1)
    assert off(rows.data.double() * rows.scale.double(), exact) < EIGHT_BITS
    weight, scale = float8.quantize_weight(w_out)
    exact = F.linear(rows.data.double() * rows.scale, weight.double() * scale, bias.double())
    assert off(float8.float8_linear(rows, weight, scale, bias, dtype), exact) < ERROR[dtype]


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e30]))
def test_rows_are_scaled_by_their_largest(shape, dtype, size):
    _, x = drawn(shape, dtype)
    x = x * size
    x[:, 0] = 0
    data, scale = float8.quantize_rows(x)
    largest = x.float().abs().amax(-1, keepdim=True)
    assert torch.allclose(scale, (largest / 448).clamp(min=1e-12))
    assert (data.float().abs().amax(-1) <= 448).all()
    back = data.double() * scale.double()
    assert ((back - x.double()).abs() <= x.double().abs() * EIGHT_BITS + scale * 2.0**-10).all()


def test_operators_trace_as_they_run():
    x, y = torch.randn(2, 3, 48), torch.randn(2, 3, 48)
    torch.library.opcheck(kernels.two_products, (x, y, torch.randn(48, 96), torch.randn(48)))
    heads = [torch.randn(2, 5, 3, 16).to(float8.E4M3) for _ in range(3)]
    scales = (torch.rand(1), torch.rand(1), torch.rand(2, 3))
    arguments = (*heads, *scales, torch.bfloat16)  # torch cannot compare such arguments
    torch.library.opcheck(float8_attention, arguments, test_utils="test_faketensor")
    torch.library.opcheck(flash_attention, tuple(x.float() for x in heads))


INTERPRETED = """
import torch
from fluxfire import kernels
from fluxfire.kernels import float8, heads as of_heads, modulated

torch.manual_seed(0)
for heads in (3, 8):
    width = heads * 16
    text, image = torch.randn(2, 5, width), torch.randn(2, 9, 2 * width)[..., width:]
    shift, scale, gate = torch.randn(2, 3 * width).chunk(3, 1)

    def same(one, other, within=1e-5):
        for a, b in zip(one, other, strict=True):
            assert (a.float() - b.float()).norm() <= within * a.float().norm()

    def dequantize(pair):
        return (pair[0].float() * pair[1],)

    for beside in (text, None):
        norm = (image, beside, shift, scale, 1e-6)
        same([kernels.modulated_norm(*norm)], [modulated._modulated_norm_cuda(*norm)])
        add = torch.randn(2, 9 + (0 if beside is None else 5), width)
        residual = (image, beside, gate, add)
        same([kernels.gated_add(*residual)], [modulated._gated_add_cuda(*residual)])
        # The interpreter cuts digits off where a GPU rounds: up to a step of e4m3, an eighth.
        same(
            dequantize(float8.modulated_norm_float8(*norm)),
            dequantize(float8._modulated_norm_float8_cuda(*norm)),
            1 / 10,
        )
    cos, sin = (torch.rand(14, 8).repeat_interleave(2, 1) for _ in range(2))
    weights = [torch.randn(16) for _ in range(4)]
    of_image = list(torch.randn(2, 9, 3 * width).chunk(3, -1))
    of_text = [torch.randn(2, 5, width) for _ in range(3)]
    image_stream = of_heads.Stream(of_image, weights[:2])
    joint = [of_heads.Stream(of_text, weights[2:]), image_stream]
    scales = [torch.tensor([0.1]), torch.tensor([0.2]), torch.rand(2, heads) + 0.1]
    cached = [torch.randn(2, 4, heads, 16) for _ in range(2)]
    cached8 = [x.to(float8.E4M3) for x in cached]
    for streams, rotary, by, more, within in (
        (joint, (cos, sin), None, None, 1e-5),
        (joint, (cos, sin), None, cached, 1e-5),
        ([image_stream], (cos[5:], sin[5:]), None, None, 1e-5),
        ([image_stream], (cos[5:], sin[5:]), None, cached, 1e-5),
        (joint, (cos, sin), scales, cached8, 1 / 8),
        ([image_stream], (cos[5:], sin[5:]), scales, None, 1 / 8),
    ):
        same(
            kernels.joint_heads(streams, rotary, 1e-6, scales=by, cached=more),
            of_heads._joint_heads_cuda(streams, rotary, 1e-6, by, more, None),
            within,
        )
    by_head = (torch.rand(2, heads), torch.rand(2, heads))
    arguments = (joint, (cos, sin), 1e-6)
    same(
        kernels.joint_heads(*arguments, cached=cached8, cached_scales=by_head),
        of_heads._joint_heads_cuda(*arguments, None, cached8, by_head),
    )
    for beside in (image, None):
        x = torch.randn(2, 9, 4 * width)
        same(
            dequantize(float8.gelu_float8(beside, x)),
            dequantize(float8._rows_float8_cuda(beside, x, gelu=True)),
            1 / 10,
        )
print("the same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_kernels_in_its_interpreter():
    import fluxfire

    paths = [str(Path(fluxfire.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fluxfire.kernels import triton_kernels as kernels

half, eight, single = "*bf16", "*fp8e4nv", "*fp32"
row = {"WIDTH": 3072}
constants = {"EPS": 1e-6, "BLOCK": 4096, "GELU": True, "WIDTH": 128, "HEADS": 8, "BESIDE": 3072}
heads = [half] * 5 + [single] * 2
for name, pointers, more in (
    ("norm_rows", [half] * 4, row),
    ("add_gated", [half] * 4, row),
    ("put_rows", [half] * 2 + [single] * 2 + [half] * 2, {"SCALED": False}),
    ("put_rows", [eight] * 2 + [single] * 2 + [half] * 2, {"SCALED": True}),
    ("norm_rows_float8", [half] * 3 + [eight, single], row),
    ("rows_float8", [half] * 2 + [eight, single], row | {"BLOCK": 8192}),
    ("rotate_heads", heads + [half] * 3 + [single] * 3, {"COPY_VALUE": True, "TO_FLOAT8": False}),
    ("rotate_heads", heads + [eight] * 3 + [single] * 3, {"COPY_VALUE": True, "TO_FLOAT8": True}),
):
    kernel = getattr(kernels, name)
    given = {n: v for n, v in (constants | more).items() if n in kernel.arg_names}
    types = iter([*pointers, *["i64"] * len(kernel.arg_names)])
    signature = {n: "constexpr" if n in given else next(types) for n in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(n),): v for n, v in given.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constexprs)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "f64" not in made.asm["ttir"], name  # float8 cannot be made of it, and it is slow
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
