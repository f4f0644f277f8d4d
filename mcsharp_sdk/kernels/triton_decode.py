"""Triton kernels for few tokens: a matrix-vector product per token and expert, in one launch.

Each program computes some rows of one slot, a slot being one expert chosen by one token. Which
width and which weights the expert has is read from a small table on the device, so that one launch
serves all experts of a layer. Weights are read as 32-bit words, and codes are multiplied as they
come out of them:

- with 16-bit activations, two at a time: what a mask leaves of a word are two fp16 numbers, code
  times a power of two, without an exponent (subnormal numbers are as fast as others). Products of a
  word are added up in fp16, 2 to 8 of them, and words in fp32. Activations are scaled to fit, 128
  at a time, by powers of two (:mod:`~mcsharp_sdk.kernels.triton_halves`);
- with 8-bit activations ``dp4a`` multiplies four codes at a time, exactly, in integers.

A block is one of packing, 128 columns. Groups of whole blocks take the fast way, one scale per row
and block; smaller groups get a scale per word and field.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import (
    BLOCK,
    code_places,
    codes_at,
    gathered_codes,
    matrix_at,
    padded,
    scale_and_zero,
    scale_pointers,
    zero_point,
)
from mcsharp_sdk.kernels.triton_halves import add_halves, multiply_halves


@triton.jit
def dp4a(codes, x, total, EMULATE: tl.constexpr):
    """``total`` plus the products of four unsigned bytes with four signed ones."""
    if EMULATE:  # the interpreter knows no assembly
        for byte in tl.static_range(4):
            signed = (x << (24 - 8 * byte)) >> 24
            total += ((codes >> (8 * byte)) & 255) * signed
        return total
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, x, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def whole_codes(word, top, BITS: tl.constexpr):
    """Words whose bytes hold whole codes: field t is in number t % 2 of the two.

    3 bits come as words of two bits and ``top``, the third bits at the places of the first ones;
    they become nibbles, the even fields in one word and the odd ones in another.
    """
    if BITS == 3:
        even = (word & 0x33333333) | ((top << 2) & 0x44444444)
        odd = ((word >> 2) & 0x33333333) | (top & 0x44444444)
        return even, odd
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return word, word


@triton.jit
def four_products(
    word, x, at, total, t: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """``total`` int32 [words, rows] plus field ``t`` of each word times its activations, int8.

    ``at`` [words] is where each word's activations begin.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACE: tl.constexpr = 4 * (t // 2) if BITS == 3 else BITS * t  # of the field in its byte
    code = word if BITS == 8 else (word >> PLACE) & ((2**BITS - 1) * 0x01010101)
    xt = tl.load((x + at + t * (16 * WIDTH)).to(tl.pointer_type(tl.int32)))
    ones = dp4a(xt * 0 + 0x01010101, xt, xt * 0, EMULATE)
    return dp4a(code, tl.broadcast_to(xt[:, None], word.shape), total, EMULATE), ones


@triton.jit
def half_products(
    word, x, at, total, t: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """``total`` [words, rows], pairs of fp16, plus field ``t`` of each word times its activations.

    As :func:`four_products`; what comes out for the activations alone is scaled as for codes.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACE: tl.constexpr = 4 * (t // 2) if BITS == 3 else BITS * t  # of the field in its byte
    ones = tl.zeros(at.shape, tl.int32)
    for odd in tl.static_range(2):
        code = (word >> (8 * odd)) & (((2**BITS - 1) << PLACE) * 0x00010001)
        xt = tl.load((x + at + (t * 2 + odd) * (8 * WIDTH)).to(tl.pointer_type(tl.int32)))
        total = multiply_halves(code, tl.broadcast_to(xt[:, None], word.shape), total, EMULATE)
        ones = multiply_halves(xt * 0 + (1 << PLACE) * 0x00010001, xt, ones, EMULATE)
    return total, ones


@triton.jit
def block_products(
    words, x, block, matrix, n, ok,
    BITS: tl.constexpr, GROUP: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Products of some blocks, fp32 [words, rows]; each word belongs to one, ``block`` [words].

    ``words`` int32 pointers [1, rows]; ``x`` the activations, whose scale is left to the caller.
    Where scales belong to whole blocks, so are scale and zero point.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    multiply: tl.constexpr = four_products if DP4A else half_products
    lane = tl.arange(0, block.shape[0]) % (4 * WIDTH)
    word = tl.load(words + (block * (4 * BITS) + lane)[:, None], cache_modifier=".cg")
    top = word
    if BITS == 3:  # the third bits, moved to where the first bits are in ``word``
        place = block * (4 * BITS) + 8 + tl.arange(0, block.shape[0]) % 4
        top = tl.load(words + place[:, None], cache_modifier=".cg")
        top >>= (lane // 4)[:, None]
    codes = whole_codes(word, top, BITS)
    at = block * 128 + lane * (4 if DP4A else 2)
    nothing, scaled = word * 0, tl.zeros(word.shape, tl.float32)
    total = nothing
    for t in tl.static_range(8 // WIDTH):
        if GROUP % 128 == 0:
            total, _ = multiply(codes[t % 2], x, at, total, t, BITS, EMULATE)
        else:
            product, ones = multiply(codes[t % 2], x, at, nothing, t, BITS, EMULATE)
            g = ((block * 128 + 16 * WIDTH * t + 4 * lane) // GROUP)[:, None]
            scale, zero = scale_and_zero(matrix, n[None, :], g, ok, GROUP, BITS)
            ones = added_up(ones, DP4A, EMULATE)[:, None]
            scaled += scale * (added_up(product, DP4A, EMULATE) - zero * ones)
    return added_up(total, DP4A, EMULATE) if GROUP % 128 == 0 else scaled


@triton.jit
def added_up(total, DP4A: tl.constexpr, EMULATE: tl.constexpr):
    """Sums of products as fp32."""
    return total.to(tl.float32) if DP4A else add_halves(total, EMULATE)


@triton.jit
def block_scales(
    matrix, n, first, blocks, GROUP: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """Scales of some blocks from ``first`` on, fp32 [blocks, rows], 0 where there are none.

    They are few, so that the compiler lets each thread load those that it needs. Loaded for each
    word, they would be passed from thread to thread.
    """
    block = first + tl.arange(0, AT_ONCE)
    g = tl.minimum(block, blocks - 1) * BLOCK // GROUP
    scales = scale_pointers(matrix, n[None, :], g[:, None], GROUP)
    return tl.load(scales, mask=(block < blocks)[:, None], other=0.0).to(tl.float32)


@triton.jit
def block_offsets(x_sums, matrix, n, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr):
    """What zero points add up to in all full blocks, fp32 [rows]; for groups of whole blocks."""
    AT_ONCE: tl.constexpr = 32
    _, s, z, rows, columns = matrix
    blocks, length = columns // BLOCK, padded(rows) * BITS // 8
    s += n.to(tl.int64) * tl.cdiv(columns, GROUP)
    places = code_places(n[None, :], rows, BITS)
    total = tl.zeros((AT_ONCE, BN), tl.float32)
    for first in range(0, blocks, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)
        inside = block < blocks
        ok = inside[:, None]
        g = block * BLOCK // GROUP
        zero = zero_point(codes_at((z + g * length)[:, None], places, ok, BITS), BITS)
        scale = tl.load(s[None, :] + g[:, None], mask=ok, other=0.0).to(tl.float32)
        total += scale * zero * tl.load(x_sums + block, mask=inside, other=0.0)[:, None]
    return tl.sum(total, 0)


@triton.jit
def last_columns(
    x, row, matrix, n,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products with the columns behind the last full block, fp32 [rows]."""
    columns = matrix[4]
    total = tl.zeros((BN, 32), tl.float32)
    for start in range(columns // BLOCK * BLOCK, columns, 32):
        k = start + tl.arange(0, 32)
        inside = (k < columns)[None, :]
        code = gathered_codes(row[:, None], k[None, :], columns, inside, BITS)
        scale, zero = scale_and_zero(matrix, n[:, None], (k // GROUP)[None, :], inside, GROUP, BITS)
        value = tl.load(x + k, mask=k < columns, other=0).to(tl.float32)[None, :]
        total += scale * (code.to(tl.float32) - zero) * value
    return tl.sum(total, 1)


@triton.jit
def dot_rows(
    activations, matrix, n,
    ORDER: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, DP4A: tl.constexpr,
    EMULATE: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows ``n`` of a matrix times the activations of a slot, fp32 [rows].

    WORDS words of each row at a time, of one block or of several. ORDER is the place of BITS among
    the widths that activations were prepared for.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    AT_ONCE: tl.constexpr = WORDS // (4 * WIDTH)
    x, codes, x_scales, x_sums = activations
    columns = matrix[4]
    row = matrix[0] + n.to(tl.int64) * (padded(columns) * BITS // 8)
    words = row.to(tl.pointer_type(tl.int32))[None, :]
    products = tl.zeros((WORDS, BN), tl.float32)
    part = codes
    if not DP4A:
        part += ORDER * (tl.cdiv(columns, BLOCK) * BLOCK)
    blocks = columns // BLOCK
    for first in tl.range(0, blocks, AT_ONCE, loop_unroll_factor=UNROLL):
        block = first + tl.arange(0, WORDS) // (4 * WIDTH)
        inside = (block < blocks)[:, None]
        block = tl.minimum(block, blocks - 1)
        found = block_products(words, part, block, matrix, n, inside, BITS, GROUP, DP4A, EMULATE)
        factor = tl.load(x_scales + block)[:, None]
        if GROUP % 128 == 0:
            scale = block_scales(matrix, n, first, blocks, GROUP, AT_ONCE)
            scale = tl.broadcast_to(scale[:, None, :], (AT_ONCE, 4 * WIDTH, BN))
            factor *= tl.reshape(scale, (WORDS, BN))
        products += factor * found
    total = tl.sum(products, 0)
    if GROUP % 128 == 0:
        total -= block_offsets(x_sums, matrix, n, BITS, GROUP, BN)
    if TAIL:
        rest = last_columns(x, row, matrix, n, BITS, GROUP, BN)
        total += rest * tl.load(x_scales + columns // BLOCK) if DP4A else rest
    return total


@triton.jit
def grouped_gemv(
    x, codes, x_scales, x_sums, out, chosen, table, weights, rows, columns, slots_per_row,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, DP4A: tl.constexpr,
    EMULATE: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """One matrix of the chosen experts times their activations; grid (row tiles, slots).

    ``codes``, ``x_scales`` and ``x_sums`` are those of :func:`prepare_activations` for x [T, K],
    which is ``codes`` itself with DP4A; slot i has row i // slots_per_row. ``chosen`` [slots] gives
    the expert, ``table`` int32 [experts + 1, 2] its width (0: none) and its place among those of
    that width, ``weights`` the stacked tensors of each of ``WIDTHS``. ``out`` is [slots, R], or
    with GATED [slots, R/2]: SiLU of the first half of the rows times the second half.
    """
    slot = tl.program_id(1).to(tl.int64)
    expert = tl.load(chosen + slot)
    width, place = tl.load(table + 2 * expert), tl.load(table + 2 * expert + 1)
    source = slot // slots_per_row
    blocks = tl.cdiv(columns, BLOCK)
    activations = (
        x + source * columns,
        codes + source * (columns if DP4A else len(WIDTHS) * BLOCK * blocks),
        x_scales + source * blocks,
        x_sums + source * blocks,
    )
    STEP: tl.constexpr = BN // 2 if GATED else BN
    last = rows // 2 if GATED else rows
    lane = tl.arange(0, BN)
    m = tl.program_id(0) * STEP + lane % STEP
    n = lane // STEP * last + tl.minimum(m, last - 1)
    total = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            matrix = matrix_at(weights[i], place, rows, columns, GROUP, WIDTHS[i])
            total = dot_rows(
                activations, matrix, n, i, WIDTHS[i], GROUP, DP4A, EMULATE, TAIL, BN,
                WORDS // 2 if WIDTHS[i] == 1 else WORDS, UNROLL,
            )  # fmt: skip
    out += slot * last + tl.program_id(0) * STEP
    at = tl.arange(0, STEP)
    if GATED:
        gate, up = tl.split(tl.reshape(total, (2, STEP)).trans(1, 0))
        total = gate * tl.sigmoid(gate) * up
    if width > 0:
        tl.store(out + at, total, mask=tl.program_id(0) * STEP + at < last)
