"""The Triton kernels. Import this module only where Triton is installed.

A kernel call handles one segment, text or image. It writes to the rows of the joint sequence from
row `first` on, so text and image need no concatenation. Pointers are to (batch, tokens, width)
with contiguous rows; strides are in elements.

Floats are `tl.constexpr`: a graph that inductor compiles passes a plain float as float64, and the
whole kernel would compute in float64. Widths are `tl.constexpr` too: Triton vectorizes a masked
load only if it knows that the width is a multiple of 16.
"""

# Triton reads annotations and default arguments of these functions itself.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def modulated_row(x, shift, scale, at, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the layer norm of the row at `x`, then `· (1 + scale) + shift`, in float32."""
    inside = at < WIDTH
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / WIDTH
    away = tl.where(inside, value - mean, 0.0)
    normed = away * tl.rsqrt(tl.sum(away * away, 0) / WIDTH + EPS)
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    return normed * (1 + factor) + tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def norm_rows(
    x, shift, scale, out,
    x_batch, x_row, mod_batch, out_batch, out_row, first,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute layer norm without weights, then `· (1 + scale) + shift`; one row per program."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    mods = batch * mod_batch
    made = modulated_row(
        x + batch * x_batch + row * x_row, shift + mods, scale + mods, at, EPS, WIDTH
    )
    to = out + batch * out_batch + (first + row) * out_row + at
    tl.store(to, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_gated(
    x, gate, add, out,
    x_batch, x_row, gate_batch, add_batch, add_row, out_batch, out_row, first,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute `x + gate · add`, with `add` and `out` from row `first` on; one row per program."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    value = tl.load(x + batch * x_batch + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + batch * gate_batch + at, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(add + batch * add_batch + (first + row) * add_row + at, mask=inside, other=0.0)
    result = value + factor * more.to(tl.float32)
    to = out + batch * out_batch + (first + row) * out_row + at
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_and_rotate(
    x, weight, cos, sin, EPS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute RMS norm over the last axis of (HEADS, WIDTH), then rotate each channel pair."""
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(x, [HEADS, WIDTH // 2, 2]))
    rotated = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(rotated, [HEADS, WIDTH])


@triton.jit
def rotate_heads(
    query, key, value, q_weight, k_weight, cos, sin, q_out, k_out, v_out,
    q_scale, k_scale, v_scale, in_batch, in_row, q_batch, kv_batch, out_row, first, heads,
    EPS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, COPY_VALUE: tl.constexpr,
    TO_FLOAT8: tl.constexpr,
):  # fmt: skip
    """Norm and rotate HEADS heads of one token's query and key; one group of heads per program.

    COPY_VALUE also copies the value. TO_FLOAT8 divides all three by their scales; the value has
    (batch, heads) scales. `cos` and `sin` are (joint tokens, WIDTH), float32, every number twice,
    since two neighbouring channels are rotated together. The kernel loads and stores whole heads
    and splits them in registers: loading every other number took thirteen times as long.
    """
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.arange(0, WIDTH)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    whole = head[:, None] * WIDTH + at[None, :]
    source = batch * in_batch + row * in_row + whole
    target = (first + row) * out_row + whole
    angle = (first + row) * WIDTH + 2 * tl.arange(0, WIDTH // 2)
    c, s = tl.load(cos + angle)[None, :], tl.load(sin + angle)[None, :]
    w = tl.load(q_weight + at).to(tl.float32)
    q = norm_and_rotate(tl.load(query + source), w, c, s, EPS, HEADS, WIDTH)
    if TO_FLOAT8:
        q = q / tl.load(q_scale)
    tl.store(q_out + batch * q_batch + target, q.to(q_out.dtype.element_ty))
    w = tl.load(k_weight + at).to(tl.float32)
    k = norm_and_rotate(tl.load(key + source), w, c, s, EPS, HEADS, WIDTH)
    if TO_FLOAT8:
        k = k / tl.load(k_scale)
    tl.store(k_out + batch * kv_batch + target, k.to(k_out.dtype.element_ty))
    if COPY_VALUE:
        v = tl.load(value + source)
        if TO_FLOAT8:
            v = v.to(tl.float32) / tl.load(v_scale + batch * heads + head)[:, None]
            v = tl.minimum(tl.maximum(v, -448.0), 448.0)
        tl.store(v_out + batch * kv_batch + target, v.to(v_out.dtype.element_ty))


@triton.jit
def put_rows(
    key, value, key_scale, value_scale, key_out, value_out, in_batch, out_batch, first,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Copy rows of keys and values to the output's rows from `first` on; one row per program.

    SCALED multiplies float8 rows by their (batch, heads) scales.
    """
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < HEADS * WIDTH
    source = batch * in_batch + row * HEADS * WIDTH + at
    target = batch * out_batch + (first + row) * HEADS * WIDTH + at
    k, v = tl.load(key + source, mask=inside), tl.load(value + source, mask=inside)
    if SCALED:
        head = batch * HEADS + at // WIDTH
        k = k.to(tl.float32) * tl.load(key_scale + head, mask=inside)
        v = v.to(tl.float32) * tl.load(value_scale + head, mask=inside)
        k, v = k.to(key_out.dtype.element_ty), v.to(value_out.dtype.element_ty)
    tl.store(key_out + target, k, mask=inside)
    tl.store(value_out + target, v, mask=inside)


@triton.jit
def store_float8(value, out, scale_out, at, inside):
    """Scale a row to e4m3's range, and store it with its scale."""
    largest = tl.max(tl.abs(value), 0)
    scale = tl.maximum(largest / 448.0, 1e-12)
    scaled = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=inside)
    tl.store(scale_out, scale)


@triton.jit
def norm_rows_float8(
    x, shift, scale, out, scale_out,
    x_batch, x_row, mod_batch, rows, first,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute `norm_rows` with float8 output; `rows` is the length of the joint sequence."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    mods = batch * mod_batch
    made = modulated_row(
        x + batch * x_batch + row * x_row, shift + mods, scale + mods, at, EPS, WIDTH
    )
    to = batch * rows + first + row
    store_float8(made, out + to * WIDTH, scale_out + to, at, inside)


@triton.jit
def rows_float8(
    beside, x, out, scale_out,
    beside_batch, beside_row, x_batch, x_row,
    BESIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Concatenate a row of `beside` and one of `x` (or its GELU), and quantize them together."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < BESIDE + WIDTH
    left = tl.load(
        beside + batch * beside_batch + row * beside_row + at, mask=at < BESIDE, other=0.0
    ).to(tl.float32)
    right = tl.load(
        x + batch * x_batch + row * x_row + at - BESIDE,
        mask=inside & (at >= BESIDE),
        other=0.0,
    ).to(tl.float32)
    if GELU:  # tanh approximation: (1 + tanh(inner)) / 2 = sigmoid(2 · inner)
        inner = 0.7978845608028654 * (right + 0.044715 * right * right * right)
        right = right * tl.sigmoid(2.0 * inner)
    to = batch * tl.num_programs(0) + row
    begin = to * (BESIDE + WIDTH)
    store_float8(left + right, out + begin, scale_out + to, at, inside)


@triton.jit
def sample_sums(
    table, sums, MIX: tl.constexpr, MIX_AGAIN: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum sampled words of many tensors, each times a hash of its position; one block per program.

    `table` has one row for each tensor: address, number of words, number of words to read, and
    number of words to read in each row of the tensor.
    """
    tensor = tl.program_id(0)
    words, count = tl.load(table + 4 * tensor + 1), tl.load(table + 4 * tensor + 2)
    of_row = tl.load(table + 4 * tensor + 3)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    start, end = i * words // tl.maximum(count, 1), (i + 1) * words // tl.maximum(count, 1)
    at = start + i // of_row * STEP % tl.maximum(end - start, 1)
    address = tl.load(table + 4 * tensor).to(tl.pointer_type(tl.int32))
    word = tl.load(address + at, mask=inside, other=0).to(tl.int64)
    mixed = i * MIX
    mixed = (mixed ^ (mixed >> 29)) * MIX_AGAIN
    tl.atomic_add(sums + tensor, tl.sum(word * ((mixed ^ (mixed >> 32)) | 1), 0))
