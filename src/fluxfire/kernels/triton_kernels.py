"""The Triton kernels. To be imported only where Triton is.

Each handles one segment of a sequence, text or image, and writes to the rows of the joint
sequence that begin at `first`: so neither has to be copied to stand beside the other.
Pointers are to (batch, tokens, width) with contiguous rows; strides are in elements.
"""

# Triton reads annotations and default arguments of these functions itself.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x, shift, scale, out,
    x_batch, x_row, mod_batch, out_batch, out_row, first, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Layer norm without affine weights, then `· (1 + scale) + shift`: one row a program."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + batch * x_batch + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    away = tl.where(inside, value - mean, 0.0)
    normed = away * tl.rsqrt(tl.sum(away * away, 0) / width + eps)
    factor = tl.load(scale + batch * mod_batch + at, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * mod_batch + at, mask=inside, other=0.0).to(tl.float32)
    result = normed * (1 + factor) + offset
    to = out + batch * out_batch + (first + row) * out_row + at
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_gated(
    x, gate, add, out,
    x_batch, x_row, gate_batch, add_batch, add_row, out_batch, out_row, first, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`x + gate · add`; of `add`, as of `out`, the rows from `first` on: one row a program."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + batch * x_batch + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + batch * gate_batch + at, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(add + batch * add_batch + (first + row) * add_row + at, mask=inside, other=0.0)
    result = value + factor * more.to(tl.float32)
    to = out + batch * out_batch + (first + row) * out_row + at
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(
    query, key, value, q_weight, k_weight, cos, sin, q_out, k_out, v_out,
    in_batch, in_row, out_batch, out_row, first, heads, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, COPY_VALUE: tl.constexpr,
):  # fmt: skip
    """RMS norm and rotary embedding of all heads of one token's query and key, one a program.

    Values are copied beside them if asked. `cos` and `sin` are (joint tokens, WIDTH), float32,
    each number twice, for neighbours that turn together.
    """
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH // 2)[None, :]
    inside = (head < heads) & (pair < WIDTH)
    even = head * WIDTH + 2 * pair
    source = batch * in_batch + row * in_row
    target = batch * out_batch + (first + row) * out_row
    c = tl.load(cos + (first + row) * WIDTH + 2 * pair)
    s = tl.load(sin + (first + row) * WIDTH + 2 * pair)
    for part in tl.static_range(2):
        x = (query if part == 0 else key) + source + even
        weight = (q_weight if part == 0 else k_weight) + 2 * pair
        out = (q_out if part == 0 else k_out) + target + even
        a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + 1, mask=inside, other=0.0).to(tl.float32)
        size = tl.rsqrt(tl.sum(a * a + b * b, 1) / WIDTH + eps)[:, None]
        a = a * size * tl.load(weight).to(tl.float32)
        b = b * size * tl.load(weight + 1).to(tl.float32)
        tl.store(out, (a * c - b * s).to(q_out.dtype.element_ty), mask=inside)
        tl.store(out + 1, (b * c + a * s).to(q_out.dtype.element_ty), mask=inside)
    if COPY_VALUE:
        at = tl.arange(0, WIDTH)[None, :]
        whole = head * WIDTH + at
        v = tl.load(value + source + whole, mask=(head < heads) & (at < WIDTH), other=0.0)
        tl.store(v_out + target + whole, v, mask=(head < heads) & (at < WIDTH))


@triton.jit
def store_float8(value, out, scale_out, at, inside):
    """Scale a row to what e4m3 holds, and store it with its scale."""
    largest = tl.max(tl.abs(value), 0)
    scale = tl.maximum(largest / 448.0, 1e-12)
    scaled = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=inside)
    tl.store(scale_out, scale)


@triton.jit
def norm_rows_float8(
    x, shift, scale, out, scale_out,
    x_batch, x_row, mod_batch, rows, first, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`norm_rows`, to float8; `rows` is the length of the joint sequence."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + batch * x_batch + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    away = tl.where(inside, value - mean, 0.0)
    normed = away * tl.rsqrt(tl.sum(away * away, 0) / width + eps)
    factor = tl.load(scale + batch * mod_batch + at, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * mod_batch + at, mask=inside, other=0.0).to(tl.float32)
    to = batch * rows + first + row
    store_float8(normed * (1 + factor) + offset, out + to * width, scale_out + to, at, inside)


@triton.jit
def rows_float8(
    beside, x, out, scale_out,
    beside_batch, beside_row, beside_width, x_batch, x_row, width,
    BLOCK: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """A row of `beside`, then one of `x` or of its GELU, scaled together to float8."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < beside_width + width
    left = tl.load(
        beside + batch * beside_batch + row * beside_row + at, mask=at < beside_width, other=0.0
    ).to(tl.float32)
    right = tl.load(
        x + batch * x_batch + row * x_row + at - beside_width,
        mask=inside & (at >= beside_width), other=0.0,
    ).to(tl.float32)  # fmt: skip
    if GELU:  # its tanh formula, by the sigmoid of twice the argument
        inner = 0.7978845608028654 * (right + 0.044715 * right * right * right)
        right = right * tl.sigmoid(2.0 * inner)
    to = batch * tl.num_programs(0) + row
    begin = to * (beside_width + width)
    store_float8(left + right, out + begin, scale_out + to, at, inside)
