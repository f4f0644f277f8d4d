"""Triton kernels for few tokens: a matrix-vector product per token and expert, in one launch.

Each program computes some rows of one slot, a slot being one expert chosen by one token. Which
width and which weights the expert has is read from a small table on the device, so that one launch
serves all experts of a layer. Weights are read as 32-bit words, and codes are multiplied as they
come out of them:

- with 16-bit activations, a byte is shifted into the mantissa of a float, where field t of it makes
  2^(8 − b·t) + code under a fitting exponent: one operation a code besides the multiplication. What
  the powers of two add up to is subtracted once per block;
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
    gathered_codes,
    matrix_at,
    padded,
    scale_and_zero,
    scale_pointers,
)

SUMS = tl.constexpr(9)
"""Sums kept of a block of activations: 0 the plain one; b = 1, 2, 4, 8: Σ 2^(8 − b·t) x."""


@triton.jit
def power_of_two(exponent):
    """2^exponent as fp32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def prepare_activations(x, codes, parts, scales, sums, columns, DP4A: tl.constexpr):
    """What the products need to know of each block of x [T, K]; grid (blocks, T).

    ``sums`` fp32 [T, blocks, SUMS]. With DP4A besides: ``codes`` int8 [T, K] and ``scales`` fp32
    [T, blocks], x ≈ scale · code with the block's largest |x| at 127; the sum is that of these.
    Without: ``parts`` fp32 [T, 4, 128 · blocks], x of each block in the orders in which words of
    the widths 1, 2, 4 and 8 hold codes: by field, byte and word.
    """
    at = tl.arange(0, BLOCK)
    k = tl.program_id(0) * BLOCK + at
    row = tl.program_id(1).to(tl.int64)
    ok = k < columns
    value = tl.load(x + row * columns + k, mask=ok, other=0.0).to(tl.float32)
    block = row * tl.num_programs(0) + tl.program_id(0)
    if DP4A:
        scale = tl.max(tl.abs(value), 0) / 127.0
        code = tl.floor(value / tl.where(scale > 0, scale, 1.0) + 0.5)
        tl.store(codes + row * columns + k, code.to(tl.int8), mask=ok)
        tl.store(scales + block, scale)
        tl.store(sums + block * SUMS, tl.sum(code, 0) * scale)
    else:
        tl.store(sums + block * SUMS, tl.sum(value, 0))
        for power in tl.static_range(4):
            words = 4 << power
            field, byte, word = at // (4 * words), at % 4, at % (4 * words) // 4
            part = parts + ((row * 4 + power) * tl.num_programs(0) + tl.program_id(0)) * BLOCK
            tl.store(part + (field * 4 + byte) * words + word, value)
            shifted = value * power_of_two(8 - (1 << power) * field)
            tl.store(sums + block * SUMS + (1 << power), tl.sum(shifted, 0))


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
def shift_left(word, bits: tl.constexpr):
    """``word`` shifted by so many bits, to the right if they are negative."""
    return word << bits if bits >= 0 else word >> -bits


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
    word, x, at, total, unknown_zero, t: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr
):
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
def magic_products(
    word, x, at, total, unknown_zero, t: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr
):
    """``total`` fp32 [words, rows] plus field ``t`` of each word times its activations, ``parts``.

    The codes are larger by 2^(8 − place of the field). Exponents that the compiler does not know
    stay in registers; others it loads again for each code.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    LOW: tl.constexpr = 15
    PLACE: tl.constexpr = 4 * (t // 2) if BITS == 3 else BITS * t  # of the field in its byte
    exponent = ((127 + 23 - LOW - PLACE) << 23) + unknown_zero
    ones = tl.zeros(at.shape, tl.float32)
    for byte in tl.static_range(4):
        value = (shift_left(word, LOW - 8 * byte) & ((2**BITS - 1) << (LOW + PLACE))) | exponent
        xt = tl.load(x + at + (t * 4 + byte) * (4 * WIDTH))
        value = value.to(tl.float32, bitcast=True)
        total = tl.fma(value, tl.broadcast_to(xt[:, None], word.shape), total)
        ones += xt
    return total, ones


@triton.jit
def block_products(
    words, x, block, matrix, n, ok, unknown_zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Products of some blocks, fp32 [words, rows]; each word belongs to one, ``block`` [words].

    ``words`` int32 pointers [1, rows]; ``x`` the activations. Where scales belong to whole blocks,
    scale, zero point and the added powers of two are left to the caller.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    multiply: tl.constexpr = four_products if DP4A else magic_products
    lane = tl.arange(0, block.shape[0]) % (4 * WIDTH)
    word = tl.load(words + (block * (4 * BITS) + lane)[:, None], cache_modifier=".cg")
    top = word
    if BITS == 3:  # the third bits, moved to where the first bits are in ``word``
        top = tl.load(words + (block * (4 * BITS) + 8 + lane % 4)[:, None], cache_modifier=".cg")
        top >>= (lane // 4)[:, None]
    codes = whole_codes(word, top, BITS)
    at = block * 128 + (4 * lane if DP4A else lane)
    nothing = word * 0 if DP4A else tl.zeros(word.shape, tl.float32)
    total, scaled = nothing, tl.zeros(word.shape, tl.float32)
    for t in tl.static_range(8 // WIDTH):
        if GROUP % 128 == 0:
            total, _ = multiply(codes[t % 2], x, at, total, unknown_zero, t, BITS, EMULATE)
        else:
            product, ones = multiply(codes[t % 2], x, at, nothing, unknown_zero, t, BITS, EMULATE)
            g = ((block * 128 + 16 * WIDTH * t + 4 * lane) // GROUP)[:, None]
            scale, zero = scale_and_zero(matrix, n[None, :], g, ok, GROUP, BITS)
            if not DP4A:
                zero += 2.0 ** (8 - (4 * (t // 2) if BITS == 3 else BITS * t))
            scaled += scale * (product.to(tl.float32) - zero * ones[:, None].to(tl.float32))
    return total.to(tl.float32) if GROUP % 128 == 0 else scaled


@triton.jit
def block_offsets(
    x_sums, matrix, n,
    BITS: tl.constexpr, GROUP: tl.constexpr, DP4A: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What zero points, and powers of two in codes, add up to in all full blocks, fp32 [rows].

    For groups of whole blocks.
    """
    AT_ONCE: tl.constexpr = 32
    SUM: tl.constexpr = 4 if BITS == 3 else BITS
    blocks = matrix[4] // BLOCK
    total = tl.zeros((AT_ONCE, BN), tl.float32)
    for first in range(0, blocks, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)
        inside = block < blocks
        g = (block * BLOCK // GROUP)[:, None]
        scale, zero = scale_and_zero(matrix, n[None, :], g, inside[:, None], GROUP, BITS)
        sums = x_sums + block * SUMS
        shift = zero * tl.load(sums, mask=inside, other=0.0)[:, None]
        if not DP4A:
            shift += tl.load(sums + SUM, mask=inside, other=0.0)[:, None]
        total += scale * shift
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
    BITS: tl.constexpr, GROUP: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows ``n`` of a matrix times the activations of a slot, fp32 [rows].

    WORDS words of each row at a time, of one block or of several.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    x, x_parts, x_scales, x_sums, unknown_zero = activations
    columns = matrix[4]
    row = matrix[0] + n.to(tl.int64) * (padded(columns) * BITS // 8)
    words = row.to(tl.pointer_type(tl.int32))[None, :]
    products = tl.zeros((WORDS, BN), tl.float32)
    part = x
    if not DP4A:  # the order of this width is number log2(WIDTH)
        part = x_parts + tl.cdiv(columns, BLOCK) * BLOCK * (WIDTH // 2 - WIDTH // 8)
    blocks = columns // BLOCK
    for first in tl.range(0, blocks, WORDS // (4 * WIDTH), loop_unroll_factor=UNROLL):
        block = first + tl.arange(0, WORDS) // (4 * WIDTH)
        inside = (block < blocks)[:, None]
        block = tl.minimum(block, blocks - 1)
        found = block_products(
            words, part, block, matrix, n, inside, unknown_zero, BITS, GROUP, DP4A, EMULATE
        )
        if GROUP % 128 == 0:
            g = (block * BLOCK // GROUP)[:, None]
            scales = scale_pointers(matrix, n[None, :], g, GROUP)
            found *= tl.load(scales, mask=inside, other=0.0).to(tl.float32)
        if DP4A:
            found *= tl.load(x_scales + block)[:, None]
        products += found
    total = tl.sum(products, 0)
    if GROUP % 128 == 0:
        total -= block_offsets(x_sums, matrix, n, BITS, GROUP, DP4A, BN)
    if TAIL:
        rest = last_columns(x, row, matrix, n, BITS, GROUP, BN)
        total += rest * tl.load(x_scales + columns // BLOCK) if DP4A else rest
    return total


@triton.jit
def grouped_gemv(
    x, x_parts, x_scales, x_sums, unknown_zero, out, chosen, table, weights, rows, columns,
    slots_per_row,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, DP4A: tl.constexpr,
    EMULATE: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """One matrix of the chosen experts times their activations; grid (row tiles, slots).

    x [T, K] is int8 with DP4A, and ``x_parts``, ``x_scales`` and ``x_sums`` are those of
    :func:`prepare_activations`; slot i has row i // slots_per_row of them. ``chosen`` [slots] gives
    the expert, ``table`` int32 [experts + 1, 2] its width (0: none) and its place among those of
    that width, ``weights`` the stacked tensors of each of ``WIDTHS``. ``out`` is [slots, R], or
    with GATED [slots, R/2]: SiLU of the first half of the rows times the second half.
    ``unknown_zero`` is 0.
    """
    slot = tl.program_id(1).to(tl.int64)
    expert = tl.load(chosen + slot)
    width, place = tl.load(table + 2 * expert), tl.load(table + 2 * expert + 1)
    source = slot // slots_per_row
    blocks = tl.cdiv(columns, BLOCK)
    activations = (
        x + source * columns,
        x_parts + source * (4 * BLOCK) * blocks,
        x_scales + source * blocks,
        x_sums + source * blocks * SUMS,
        unknown_zero,
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
                activations, matrix, n, WIDTHS[i], GROUP, DP4A, EMULATE, TAIL, BN, WORDS, UNROLL
            )
    out += slot * last + tl.program_id(0) * STEP
    at = tl.arange(0, STEP)
    if GATED:
        gate, up = tl.split(tl.reshape(total, (2, STEP)).trans(1, 0))
        total = gate * tl.sigmoid(gate) * up
    if width > 0:
        tl.store(out + at, total, mask=tl.program_id(0) * STEP + at < last)


@triton.jit
def combine_slots(
    y, chosen, routing, out, width, experts, slots_per_row, BH: tl.constexpr
):  # fmt: skip
    """out [T, H] = Σ_j routing[t, j] · y[t, j]; slots without an expert count nothing.

    Grid (H tiles, T); y [T·k, H], added up in fp32 in the order of the slots.
    """
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BH,), tl.float32)
    for j in range(slots_per_row):
        slot = row * slots_per_row + j
        if tl.load(chosen + slot) < experts:
            value = tl.load(y + slot * width + h, mask=h < width, other=0.0).to(tl.float32)
            total += value * tl.load(routing + slot).to(tl.float32)
    tl.store(out + row * width + h, total, mask=h < width)
